"""Bad samples at run time: what is recorded of each, and how many are tolerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from datamodules.errors import DataError

OnError = Literal["raise", "skip"]


class Fault(NamedTuple):
    """A sample that could not be read or decoded.

    Attributes:
        shard: file name.
        sample: number in the shard.
        key: sample key, empty if it could not be read.
        epoch: epoch of the stream.
        position: position in the epoch's order.
        error: what went wrong.
    """

    shard: str
    sample: int
    key: str
    epoch: int
    position: int
    error: str

    def __str__(self) -> str:
        named = f" (key {self.key!r})" if self.key else ""
        where = f"sample {self.sample} of {self.shard}{named}, epoch {self.epoch}, position {self.position}"
        return f"{where}: {self.error}"


@dataclass(frozen=True)
class FaultPolicy:
    """What to do about bad samples.

    Attributes:
        on_error: `raise` stops at the first one; `skip` masks its place in the batch, so that no other sample
            moves.
        max_bad: with `skip`, bad samples tolerated in an epoch, over all ranks.
        max_bad_share: with `skip`, the same as a share of the epoch; the smaller of the two limits holds.
    """

    on_error: OnError = "raise"
    max_bad: int = 100
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise DataError(f'on_error is {self.on_error!r}, expected "raise" or "skip"')

    def allowed(self, total: int) -> int:
        """Bad samples tolerated in an epoch of `total` samples."""
        return 0 if self.on_error == "raise" else min(self.max_bad, int(self.max_bad_share * total))

    def verdict(self, bad: int, total: int, last: Fault | None) -> DataError:
        """The error that ends the run."""
        example = f"; here: {last}" if last else "; the log of another rank names it"
        if self.on_error == "raise":
            advice = 'mend the shard, or pass on_error="skip" to mask bad samples up to a budget'
            return DataError(f"{bad} sample(s) could not be read{example}; {advice}")
        return DataError(
            f"{bad} bad samples in this epoch, allowed are {self.allowed(total)} (max_bad={self.max_bad}, "
            f"max_bad_share={self.max_bad_share}){example}; mend the shards or raise the budget"
        )

    def summary(self, bad: int, total: int) -> str:
        """What a pass says at its end if bad samples were skipped."""
        return (
            f"{bad} of {total} samples of this epoch were bad and skipped; allowed are {self.allowed(total)}"
        )
