"""Token reduction between the layers of a backbone, where it saves the backbone's compute (reduction.md)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qm_lightning.backbones.hf import HFBackbone
from qm_lightning.backbones.layered import Layered, Layout
from qm_lightning.backbones.layout import attention_modules, grid_positions, patch_grid
from qm_lightning.backbones.recording import recording
from qm_lightning.errors import UserError
from qm_lightning.merging import Budget, BudgetMerger, DynamicViT, Merger, Schedule
from qm_lightning.merging.base import Causality, require_reach
from qm_lightning.merging.noise import Noise
from qm_lightning.tokens import MergedTokens, Tokens


class InBackbone(Merger):
    """Applies a merger before some layers of the backbone instead of behind it.

    Each place has a merger of its own, a copy of ``merger``, which reads the hidden states there, and keys and
    attention statistics of the layer before. Class, register and protected tokens stay as they are. The
    layers that follow see merged tokens with the log of their size added to the scores (proportional
    attention). Weights and classes of the backbone are untouched: hooks that live as long as one call change
    what goes into a layer, and the attention function that the backbone registered reads the sizes.

    In training DynamicViT keeps dropped tokens in the tensor and masks them, as published, so that its
    predictors get a gradient; the plain backbone is the teacher of what the kept tokens should become
    (``losses["distill"]``). In evaluation dropped tokens are gone.

    Args:
        merger: with a budget: ToMe, ToFu, EViT, DynamicViT, ...
        schedule: places and shares; ``None``: before every layer but the first, equally many.
        budget: tokens left in the end; ``None``: the merger's.
        proportional: add the log of the sizes to the attention scores. ToMe needs it with supervised models
            as they come, not with masked auto-encoders.
        distill: weight of the mean squared error to the plain backbone, for DynamicViT.
    """

    causality: ClassVar[Causality] = "global"
    inside: ClassVar[bool] = True

    def __init__(
        self,
        merger: Merger,
        schedule: Schedule | None = None,
        budget: Budget | None = None,
        proportional: bool = True,
        distill: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(merger, BudgetMerger):
            raise UserError(
                f"InBackbone(merger={type(merger).__name__}): expected a merger with a budget of tokens, such "
                "as ToMe, ToFu, EViT or DynamicViT"
            )
        self.schedule = Schedule() if schedule is None else schedule
        self.budget = merger.budget if budget is None else budget
        self.proportional, self.distill = proportional, distill
        self.stages = nn.ModuleList([merger])
        self.places: tuple[int, ...] = ()

    @property
    def masks(self) -> bool:
        """Whether dropped tokens stay in the tensor now, for the sake of the gradient."""
        return self.training and isinstance(self.stages[0], DynamicViT)

    def prepare(self, backbone: Any) -> None:
        """Make the mergers of all places.

        Raises:
            UserError: the backbone does not let tokens be removed between its layers, or not so many.
        """
        self.places = self.schedule.places(len(reducible_layers(backbone)))
        require_reach(self.budget, backbone)
        first = self.stages[0]
        if isinstance(first, Merger):
            first.build(backbone.hidden_size, 1)
        while len(self.stages) < len(self.places):
            self.stages.append(_sibling(first, len(self.stages)))

    def forward(self, tokens: Tokens) -> MergedTokens:
        """Not behind a backbone."""
        raise UserError("InBackbone removes tokens inside the backbone; call encode(backbone, inputs)")

    def encode(self, backbone: Any, inputs: dict[str, Tensor], plain: Tokens | None = None) -> MergedTokens:
        """Run the backbone and remove tokens on the way.

        Args:
            backbone: the ``HFBackbone`` that ``prepare`` saw.
            inputs: as the backbone takes them.
            plain: what the backbone makes of them when no token is removed: the teacher of DynamicViT, and
                the seeds of the noise.

        Returns:
            The merged tokens; ``assignment`` speaks of the tokens that the plain backbone gives.
        """
        if not self.places:
            self.prepare(backbone)
        learns = any(p.requires_grad for p in self.stages.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training and learns):
            call = Layered(
                list(self.stages),
                self.schedule,
                self.budget,
                _layout(backbone, inputs),
                seeds=None if plain is None else plain.seeds,
                proportional=self.proportional,
                masks=self.masks,
            )
            values = self._run(backbone, inputs, call)
            return call.finish(values, None if plain is None else plain.values, self.distill)

    def _run(self, backbone: HFBackbone, inputs: dict[str, Tensor], call: Layered) -> Tensor:
        layers = reducible_layers(backbone)
        before = {place - 1 for place in self.places}
        watched = {m: i for m, i in attention_modules(backbone.model).items() if i in before}
        received = any(merger.reads_received for merger in self.stages if isinstance(merger, Merger))
        names = ("input_ids", "attention_mask") if backbone.modality == "text" else ("pixel_values",)
        given = {name: inputs[name] for name in names if name in inputs}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(backbone.model.dtype)
        device = next(iter(given.values())).device
        with recording(watched, received) as record, torch.autocast(device.type, enabled=False):
            places = [layers[place] for place in self.places]
            with _hooked(places, lambda s, hidden: call.reduce(s, hidden, record, self.places[s] - 1)):
                values: Tensor = backbone.model(**given).last_hidden_state
        return values


def reducible_layers(backbone: HFBackbone) -> list[nn.Module]:
    """The layers of an encoder that care for nothing but hidden states and mask.

    Raises:
        UserError: the model is causal, or its layers get positions from outside (RoPE, relative positions).
    """
    model = backbone.model
    names = {module: name for name, module in model.named_modules()}
    roots: dict[int, str] = {}
    for module, index in attention_modules(model).items():
        head, _, _ = names[module].partition(f".{index}.")
        roots.setdefault(index, f"{head}.{index}")
    layers = [model.get_submodule(roots[i]) for i in sorted(roots)]
    outside = [
        name
        for name in inspect.signature(type(layers[0]).forward).parameters
        if "position" in name or "rotary" in name
    ]
    if backbone.causal or outside:
        why = "it is causal" if backbone.causal else f"its layers get {outside[0]} for every place"
        raise UserError(
            f"InBackbone cannot remove tokens between the layers of {backbone.name_or_path!r} "
            f"({type(model).__name__}): {why}; expected an encoder such as ViT, DINOv2, CLIP or BERT; "
            "use the merger behind the backbone instead"
        )
    return layers


@contextmanager
def _hooked(layers: list[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Let ``change(place, hidden)`` replace what goes into some layers, for the length of one call."""

    def hook(place: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
        def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (change(place, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(place, kwargs["hidden_states"])}

        return replace

    handles = [layer.register_forward_pre_hook(hook(s), with_kwargs=True) for s, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sibling(merger: nn.Module, place: int) -> nn.Module:
    """A merger with the same arguments, fresh weights and noise of its own."""
    copied = copy.deepcopy(merger)
    for module in copied.modules():
        if isinstance(module, Noise):
            module.seed += place
        elif isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    return copied


def _layout(backbone: HFBackbone, inputs: dict[str, Tensor]) -> Layout:
    """Which tokens the first layer gets, as far as it is known before the model runs."""
    protect = backbone.special_tokens == "protect"
    if backbone.modality == "text":
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0).unsqueeze(-1)
        edges = torch.tensor(backbone.edge_ids, dtype=ids.dtype, device=ids.device)
        protected = torch.isin(ids, edges) & mask if protect else None
        return Layout(mask.shape[1], lambda extra: (mask, positions, protected), keeps_special=True)
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5 and backbone.modality == "image":
        raise UserError(
            "InBackbone was given clips for an image backbone, which reads them frame by frame; expected "
            "pictures, or a video backbone"
        )
    grid = patch_grid(backbone.config, pixels)
    samples, patches = pixels.shape[0], math.prod(grid)

    def tokens(special: int) -> tuple[Tensor, Tensor, Tensor | None]:
        where = grid_positions(grid, special, None, pixels.device).expand(samples, -1, -1)
        first = torch.arange(special + patches, device=pixels.device) < special
        return torch.ones_like(where[..., 0], dtype=torch.bool), where, first.expand(samples, -1)

    return Layout(patches, tokens, keeps_special=protect)
