"""What a comparison shows, in words that a reader can check against the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qm_lightning.reporting.columns import count, nats
from qm_lightning.reporting.gaps import CLEAR, gap_between
from qm_lightning.reporting.rows import (
    COMPRESSION,
    KEPT,
    QUALITY,
    Row,
    at_target,
    pareto_front,
    put_together,
    targets,
)
from qm_lightning.reporting.runs import Run

OFF_TARGET = 0.05  # relative distance from the asked compression that is pointed out
OURS = "QuickMerge"


@dataclass(frozen=True)
class Findings:
    """Sentences.

    Attributes:
        headline: who wins where.
        details: one sentence per compression, the reference, the Pareto front.
        caveats: what makes the figures less comparable than they look.
    """

    headline: str
    details: list[str]
    caveats: list[str]


def find(runs: Sequence[Run]) -> Findings:
    """Findings for the runs of one experiment."""
    rows = put_together(runs)
    blocks = [(target, at_target(rows, target)) for target in targets(rows)]
    blocks = [(target, block) for target, block in blocks if block]
    details = [_block(target, block) for target, block in blocks]
    details += _reference(rows) + _front(rows)
    return Findings(_headline(blocks, rows), details, _caveats(runs, rows))


def _figure(row: Row) -> str:
    spread = row.spread(QUALITY)
    return nats(row.mean(QUALITY)) + (f" \u00b1 {nats(spread)}" if math.isfinite(spread) else "")


def _at(target: float | None) -> str:
    return "at an unknown compression" if target is None else f"at {target:g}x"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def focus(rows: Sequence[Row]) -> str | None:
    """The method that the headline is about: QuickMerge, or its first variant; ``None``: there is none."""
    ours = [row.method for row in rows if row.merger == OURS]
    return OURS if OURS in ours else min(ours, default=None)


def _headline(blocks: Sequence[tuple[float | None, list[Row]]], rows: Sequence[Row]) -> str:
    compared = [(target, block) for target, block in blocks if len(block) > 1]
    if not compared:
        known = [row for row in rows if row.seen(QUALITY)]
        if not known:
            return "No run says how good it is: their results.json hold no quality/nats."
        row = next((r for r in known if not r.full), known[0])
        return (
            f"{row.method} reaches {_figure(row)} nats per target token on {count(row.mean(KEPT))} of "
            f"{count(row.mean(KEPT) * row.mean(COMPRESSION))} tokens; no other method was run at the same compression."
        )
    name = focus([row for _, block in compared for row in block])
    if name is None:
        leaders = [f"{block[0].method} {_at(target)}{_mark(*block[:2])}" for target, block in compared]
        return "Lowest loss: " + _listed(leaders) + _footnote(compared)
    own = [(target, block) for target, block in compared if any(row.method == name for row in block)]
    won = [f"{_short(target)}{_mark(*block[:2])}" for target, block in own if block[0].method == name]
    lost = []
    for target, block in own:
        ours = next(row for row in block if row.method == name)
        if block[0] is not ours:
            theirs, own_figure = nats(block[0].mean(QUALITY)), nats(ours.mean(QUALITY))
            gap = (
                f"lower, {theirs} against {own_figure}"
                if theirs != own_figure
                else f"level with it, {theirs}"
            )
            lost.append(f"{_at(target)} {block[0].method} is {gap}{_mark(block[0], ours)}")
    text = f"{name} has the lowest loss at {len(won) or 'none'} of {len(own)} compressions"
    if len(own) == 1 and not won:
        text = f"{name} does not have the lowest loss"
    text += f" ({', '.join(won)})" if won else ""
    return text + (f"; {_listed(lost)} nats per target token" if lost else "") + _footnote(own)


def _short(target: float | None) -> str:
    return "unknown" if target is None else f"{target:g}x"


def _mark(best: Row, other: Row) -> str:
    return "*" if gap_between(best, other).decided is False else ""


def _footnote(blocks: Sequence[tuple[float | None, list[Row]]]) -> str:
    close = any(gap_between(block[0], row).decided is False for _, block in blocks for row in block[1:2])
    return f". (* less than {CLEAR:g} standard errors over the seeds: not decided.)" if close else "."


def _block(target: float | None, block: list[Row]) -> str:
    at = _at(target)
    best = block[0]
    text = f"{at[0].upper()}{at[1:]}: {best.method} is lowest with {_figure(best)} nats "
    text += f"on {count(best.mean(KEPT))} tokens"
    if len(block) == 1:
        return text + "; nothing to compare with."
    text += f"; next is {block[1].method} with {_figure(block[1])} ({gap_between(best, block[1]).text})"
    name = focus(block)
    if name is not None and name not in (best.method, block[1].method):
        place, own = next((i, row) for i, row in enumerate(block) if row.method == name)
        text += f"; {name} is number {place + 1} of {len(block)} with {_figure(own)} ({gap_between(best, own).text})"
    exact = [row for row in block if row.seen("quality/exact")]
    if exact:
        top = max(exact, key=lambda row: row.mean("quality/exact"))
        share = f"{100 * top.mean('quality/exact'):.1f} %"
        text += (
            f". Exact match {'agrees' if top is best else f'says otherwise: {top.method} leads'} ({share})"
        )
    return text + "."


def _reference(rows: Sequence[Row]) -> list[str]:
    full = next((row for row in rows if row.full and row.seen(QUALITY)), None)
    if full is None:
        return []
    merged = [row for row in rows if not row.full and row.seen(QUALITY)]
    better = [r.name for r in merged if r.mean(QUALITY) <= full.mean(QUALITY)]
    text = f"All {count(full.mean(KEPT))} tokens (NoMerge): {_figure(full)} nats. "
    if not merged:
        return [text.strip()]
    return [
        text
        + (
            f"With fewer tokens, as good or better: {_listed(better)}."
            if better
            else "Every merger loses to it."
        )
    ]


def _front(rows: Sequence[Row]) -> list[str]:
    """Who is on the front of tokens kept against loss, and where rivals beat ours with no more tokens."""
    placed = [row for row in rows if row.seen(QUALITY) and row.seen(KEPT)]
    if len({row.method for row in placed}) < 2:
        return []
    front = [placed[i] for i in pareto_front([(row.mean(KEPT), row.mean(QUALITY)) for row in placed])]
    lines = [f"On the Pareto front of tokens kept against loss: {_listed([row.name for row in front])}."]
    name = focus(placed)
    if name is not None:
        beaten = [
            f"{row.target_text} (by {by.name}, {nats(by.mean(QUALITY))} on {count(by.mean(KEPT))} tokens)"
            for row in placed
            if row.method == name and (by := _beaten_by(row, placed)) is not None
        ]
        lines.append(
            f"A rival is lower than {name} with no more tokens at {_listed(beaten)}."
            if beaten
            else f"Nowhere is a rival lower than {name} with no more tokens."
        )
    return lines


def _beaten_by(row: Row, others: Sequence[Row]) -> Row | None:
    rivals = [
        r
        for r in others
        if r.method != row.method and r.mean(KEPT) <= row.mean(KEPT) and r.mean(QUALITY) < row.mean(QUALITY)
    ]
    return min(rivals, key=lambda r: r.mean(QUALITY), default=None)


def _caveats(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    caveats = []
    for row in rows:
        measured = row.mean(COMPRESSION)
        if row.target and not row.full and abs(measured / row.target - 1) > OFF_TARGET:
            caveats.append(
                f"{row.method} was asked for {row.target:g}x and gave {measured:.2f}x "
                f"({count(row.mean(KEPT))} tokens): compare it along the plots, not within its block."
            )
    for key, what in (("steps", "training steps"), ("samples", "test samples"), ("split", "split")):
        values = {str(run.raw[key]) for run in runs if run.raw.get(key) is not None}
        if len(values) > 1:
            caveats.append(
                f"The runs differ in {what} ({', '.join(sorted(values))}): this is not the same work."
            )
    seeds = {len({run.seed for run in row.runs}) for row in rows}
    if len(seeds) > 1:
        caveats.append(f"The number of seeds differs between rows, from {min(seeds)} to {max(seeds)}.")
    if max(seeds) == 1:
        caveats.append("One seed only: no spread is known.")
    return caveats
