"""The one exception for what a user can mend, and the exit code after Ctrl-C."""

from __future__ import annotations

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class UserError(Exception):
    """Bad input. The message says what was found, what was expected and how to mend it, on one line.

    The command line prints it without a traceback and leaves with exit code 2.
    """
