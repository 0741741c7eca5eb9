"""Where commands print their tables and lines."""

from __future__ import annotations

import os

from rich.console import Console

LOG_WIDTH = 200


def console() -> Console:
    """As wide as the terminal; in a log or a pipe, which rich takes for 80 columns, wide enough not to fold lines."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=LOG_WIDTH)
