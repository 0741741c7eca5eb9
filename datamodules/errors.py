"""The one exception for bad data that a user can mend."""

from __future__ import annotations


class DataError(Exception):
    """Bad data. The message says what was found, what was expected and how to mend it, on one line.

    The command line prints it without a traceback and leaves with exit code 2.
    """
