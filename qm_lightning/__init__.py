"""Token merging for generative models, trained with Lightning.

The names below load torch on first use, so that ``train.py --help`` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qm_lightning.tokens import AttentionStats, MergedTokens, Tokens

__all__ = ["AttentionStats", "MergedTokens", "Tokens"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from qm_lightning import tokens

        return getattr(tokens, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
