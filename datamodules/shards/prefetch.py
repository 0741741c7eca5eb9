"""Fetches shards before they are needed: the order is known ahead, so nothing is fetched in vain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from datamodules.errors import DataError
from datamodules.shards.cache import ShardCache

log = logging.getLogger(__name__)


class Prefetcher:
    """Fetches files into a cache, in a thread of its own; several ranges of a file are in flight at a time.

    Args:
        cache: where the files go. Of a limited cache at most half is filled ahead, so that what is being read
            is not pushed out.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[str] = []
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, shards: Iterable[str]) -> None:
        """Say which shards come next, in this order; forgets what was asked before and not begun."""
        wanted, budget = [], (self._cache.limit or 0) // 2
        for shard in shards:
            budget -= self._cache.files[shard].bytes
            if self._cache.limit is not None and budget < 0:
                break
            wanted += [f"{shard}.idx", shard]
        with self._news:
            self._wanted = wanted[::-1]
            self._news.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._wanted:
                    self._news.wait()
                name = self._wanted.pop()
            try:
                self._cache(name)
            except (DataError, OSError) as error:  # whoever needs the file meets it again, and reports it
                log.debug("fetching %s ahead failed: %s", name, error)
