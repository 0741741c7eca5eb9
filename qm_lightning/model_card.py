"""The README.md of an export: what it is, what it reached, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_USE = {
    "conditioning": """\
from qm_lightning.export import from_pretrained

model = from_pretrained("."{modality})
backbone = model.load_backbone()                # {backbone}
merged = model.merge(backbone(inputs))          # {inputs}
ids = model.prior.generate(merged, max_new_tokens=64, temperature=0.0, eos_id={eos_id})""",
    "streaming": """\
from qm_lightning.backbones.incremental import growing_encoder
from qm_lightning.export import from_pretrained

model = from_pretrained("."{modality})
encode = growing_encoder(model.load_backbone(), model.merger)   # {backbone}
ids = model.prior.generate(encode, prompts, mask, max_new_tokens=64, eos_id={eos_id})   # prompts [B,N], mask [B,N]""",
}
_INPUTS = {
    "text": '{"input_ids": [B,N], "attention_mask": [B,N]}',
    "image": '{"pixel_values": [B,C,H,W]}',
    "video": '{"pixel_values": [B,F,C,H,W]}',
}


def model_card(config: Mapping[str, Any], weights: int) -> str:
    """Markdown with the YAML head that model hubs read.

    Args:
        config: content of config.json.
        weights: number of them.
    """
    facts = config["facts"]
    several = "paths" in config
    paths = config["paths"] if several else {"": config}
    use = _USE[config["mode"]]
    uses = [
        use.format(
            modality=f', modality="{name}"' if several else "",
            backbone=path["backbone"]["name_or_path"],
            inputs=_INPUTS[path["backbone"]["modality"]],
            eos_id=config["eos_id"],
        )
        for name, path in paths.items()
    ]
    mergers = ", ".join(dict.fromkeys(path["merger"]["class"] for path in paths.values()))
    lines = [
        "---",
        "library_name: qm-lightning",
        "tags: [token-merging]",
        "---",
        "",
        f"# {mergers} and a causal prior ({config['mode']} mode)",
        "",
        f"{weights:,} weights, trained behind frozen backbones that are not part of this export. Each is known by its "
        "fingerprint; another one is refused.",
        "",
        *(f"- {_behind(name, path)}" for name, path in paths.items()),
        "",
        *_table("Run", {k: v for k, v in facts.items() if k != "metrics"}),
        *_table("Metrics on the test shards", facts.get("metrics") or {}),
        *([] if facts.get("metrics") else ["The run was not tested, so no metric is known.", ""]),
        "## Use",
        "",
        *("    " + line if line else "" for line in "\n\n".join(uses).splitlines()),
        "",
        *(
            f"On the command line: `python train.py generate .{f' --modality {n}' if several else ''} --prompt TEXT`.\n"
            for n, path in paths.items()
            if path["text"]
        ),
        f"Made by qm_lightning {config['versions']['qm_lightning']}, torch {config['versions']['torch']}.",
        "",
    ]
    return "\n".join(lines)


def _behind(name: str, path: Mapping[str, Any]) -> str:
    backbone, merger = path["backbone"], path["merger"]["class"]
    modality = (
        backbone["modality"] if name in ("", backbone["modality"]) else f"{name}: {backbone['modality']}"
    )
    return f"`{backbone['name_or_path']}` ({modality}), merged by {merger}: `{backbone['fingerprint']}`"


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    shown = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in rows.items())
    return [f"## {title}", "", "| | |", "| --- | --- |", *(f"| {n} | {v} |" for n, v in shown), ""]
