"""How long one rank waits for another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

from qm_lightning.errors import UserError

TIMEOUT_VARIABLE = "QM_LIGHTNING_TIMEOUT_S"


def collective_timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """How long a collective waits for a lost rank: 5 minutes, or what the environment says.

    Lightning waits 30 minutes. Five are enough for a slow start from a shared file system.

    Raises:
        UserError: not a number of seconds.
    """
    text = env.get(TIMEOUT_VARIABLE, "300")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"found {TIMEOUT_VARIABLE}={text!r}; expected whole seconds; mend or unset it")
    return timedelta(seconds=int(text))
