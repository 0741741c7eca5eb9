"""W&B's service is a process of its own and may end before the training, which then goes on without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., None])


def while_service_lives(method: Method) -> Method:
    """Make a method do nothing once W&B's service is gone, and say so when it is noticed.

    SLURM signals every process of a job, and the service ends at once, with the rows of the last seconds; it cannot be
    started so that it would not. The training still has a step to finish, to save, and an exit code to give.

    Args:
        method: of a logger, whose ``service_lost`` starts False.

    Returns:
        The method.
    """

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.service_lost:
            return
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            method(self, *args, **kwargs)
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            self.service_lost = True
            print(
                f"W&B: its service has ended ({type(error).__name__}); what comes is in metrics.csv alone",
                file=sys.stderr,
                flush=True,
            )
            _forget_service()

    return cast(Method, guarded)


def _forget_service() -> None:
    """Else W&B asks the dead service once more when the process ends, and prints a stack of calls."""
    import wandb

    with suppress(Exception):
        wandb.teardown()
