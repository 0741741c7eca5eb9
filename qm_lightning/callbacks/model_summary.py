"""What is trained and what is frozen, part by part, before a training starts."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich import get_console
from rich.table import Table
from torch import nn


class TrainedAndFrozen(ModelSummary):
    """A table of the module's parts with their trained and their frozen parameters.

    Lightning's has one column for both, and one of FLOPs that is zero without an example input; ours are counted
    on a real batch (``perf/gflops_per_step``).
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, once for all ranks."""
        if trainer.is_global_zero:
            get_console().print(summary_table(pl_module))


def summary_table(module: nn.Module) -> Table:
    """One row for each child that has parameters, and the total.

    Args:
        module: under FSDP2 the whole parameters are counted, not one rank's shard.
    """
    table = Table("part", "class", header_style="bold", show_footer=True)
    counted = {name: (type(child).__name__, *_count(child)) for name, child in module.named_children()}
    trained, frozen = _count(module)
    table.columns[0].footer = "total"
    for title, total in (("trained", trained), ("frozen", frozen)):
        table.add_column(title, _words(total), justify="right")
    for name, (kind, *counts) in counted.items():
        if any(counts):
            table.add_row(name, kind, *map(_words, counts))
    return table


def _count(module: nn.Module) -> tuple[int, int]:
    """Trained and frozen parameters."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    for parameter in module.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return sizes[True], sizes[False]


def _words(count: int) -> str:
    return get_human_readable_count(count).strip() if count else "0"
