"""The one exception for bad data that a user can mend."""

from __future__ import annotations

import sys


class DataError(Exception):
    """Bad data. The message says what was found, what was expected and how to mend it, on one line.

    The command line prints it without a traceback and leaves with exit code 2.
    """


def outside_environment(error: ModuleNotFoundError) -> str:
    """What to say of a missing package: most often the command ran in another Python than the project's.

    Args:
        error: the failed import.

    Raises:
        ModuleNotFoundError: ``error`` itself, where one of the project's own modules is missing: that is a bug.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "qm_lightning", "datamodules"):
        raise error
    return (
        f"found no package {package!r} in {sys.executable}; expected the project's environment; make it with "
        "`make setup`, enter it with `source .venv/bin/activate`, and give the same command again"
    )
