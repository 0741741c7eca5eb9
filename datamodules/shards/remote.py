"""Fetches files from http(s), S3, Google Cloud Storage and the Hugging Face hub, through fsspec.

Large files come in ranges with several in flight: one request per sample would be a hundred times slower, one
request per shard some four times. Credentials come from where each service keeps them (environment, ~/.aws,
~/.netrc, `hf auth login`), never from the address.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from datamodules.errors import DataError

log = logging.getLogger(__name__)

EXTRAS = {"http": "", "https": "", "s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": ""}
"""Schemes that are read, and the extra of this package that each needs."""

RANGE_BYTES = 8 << 20  # of one request
IN_FLIGHT = 8  # requests at a time for one file
PAUSES = (0.5, 2.0, 8.0)  # seconds before another try
CONNECT_SECONDS, STALL_SECONDS = 15.0, 30.0  # without a connection, without a byte

_NO_KEYS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
)  # of botocore, which is an extra
_TRANSIENT = (408, 425, 429)  # of the client errors; all others stay
T = TypeVar("T")


class UnexpectedContentError(OSError):
    """An answer of the wrong length: an error page, or a connection that was cut."""


def is_url(root: str) -> bool:
    """Whether a data set lies elsewhere."""
    return "://" in root


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL.

    Attributes:
        root: its address, without a slash at the end.
    """

    root: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.root)
        if parts.scheme not in EXTRAS:
            raise DataError(
                f"{parts.scheme}:// is not read, expected one of {', '.join(f'{s}://' for s in EXTRAS)} "
                "or a local folder"
            )
        if parts.username or parts.password or parts.query:
            raise DataError(
                f"the address of {parts.hostname}{parts.path} holds a password or a token, which other users and "
                "logs could see; expected a plain address: put credentials where the service looks for them "
                "(~/.netrc, AWS_* variables, hf auth login)"
            )

    def read(self, name: str) -> bytes:
        """The contents of a small file.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it cannot be fetched.
        """
        return self._persist(name, lambda: self._cat(name))

    def download(self, name: str, size: int, target: Path) -> None:
        """Fetch a file of known size in ranges; a server that knows no ranges gives it whole.

        Args:
            name: file name in the folder.
            size: bytes.
            target: an existing file that is overwritten.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it cannot be fetched, or has another size.
        """
        spans = [(start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
        descriptor = os.open(target, os.O_WRONLY)
        try:
            first = self._range(name, spans[0], size)
            os.pwrite(descriptor, first, 0)
            if len(first) < size:
                self._fill(descriptor, name, spans[1:], size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, name: str, spans: Iterable[tuple[int, int]], size: int) -> None:
        def fetch(span: tuple[int, int]) -> None:
            os.pwrite(descriptor, self._range(name, span, size), span[0])

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(fetch, spans):  # the first failure cancels what has not begun
                pass

    def _range(self, name: str, span: tuple[int, int], size: int) -> bytes:
        start, end = span

        def attempt() -> bytes:
            data = self._cat(name, start, end)
            if len(data) == size and end - start < size:
                return data if start == 0 else data[start:end]  # the whole file: it knows no ranges
            if len(data) != end - start:
                shown = f", beginning with {data[:40]!r}" if data.startswith(b"<") else ""
                raise UnexpectedContentError(f"found {len(data)} bytes{shown}, expected {end - start}")
            return data

        return self._persist(name, attempt)

    def _cat(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        system, path = _filesystem(self.root)
        data: bytes = system.cat_file(f"{path}/{name}", start=start, end=end)
        return data

    def _persist(self, name: str, attempt: Callable[[], T]) -> T:
        """Try, and try again where that may help."""
        for pause in (*PAUSES, None):
            try:
                return attempt()
            except (FileNotFoundError, DataError):
                raise
            except Exception as error:  # every service has its own exceptions
                if pause is None or _is_final(error):
                    raise DataError(
                        f"cannot fetch {self.root}/{name}: {_describe(error)}; check the address, the network and "
                        "your credentials for it"
                    ) from error
                log.warning("trying %s/%s again in %.1f s: %s", self.root, name, pause, _describe(error))
                time.sleep(pause)
        raise AssertionError("unreachable")


def _filesystem(root: str) -> tuple[Any, str]:
    """The file system of an address, by fsspec, which keeps one per process, and the path in it."""
    from fsspec.core import url_to_fs

    scheme = urlsplit(root).scheme
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
        options = {
            "client_kwargs": {"timeout": timeout, "trust_env": True}
        }  # trust_env: proxies and ~/.netrc
    try:
        system, path = url_to_fs(root, **options)
    except ImportError as error:
        raise DataError(
            f"reading {scheme}:// needs another package ({error}): pip install 'qm-lightning[{EXTRAS[scheme]}]'"
        ) from error
    return system, str(path)


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: no permission, or a request that the server refuses."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT
    return refused or isinstance(error, PermissionError) or type(error).__name__ in _NO_KEYS


def _describe(error: Exception) -> str:
    status = getattr(error, "status", None)
    text = " ".join(str(error).split()) or "no answer in time"
    return (
        f"HTTP {status} {getattr(error, 'message', '')}".strip()
        if status
        else f"{type(error).__name__}: {text}"
    )
