"""Which classes a configuration may name."""

from __future__ import annotations

# A configuration can name classes of these packages only: `class_path: os.system` is refused.
ALLOWED_PACKAGES = ["qm_lightning", "datamodules", "lightning", "torch.optim", "torch.nn", "torchmetrics"]


def limit_imports() -> None:
    """Let parsers import from these packages and from nowhere else."""
    import jsonargparse  # not before: `--help` names the packages in 0.1 s

    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED_PACKAGES)
