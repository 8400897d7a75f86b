"""The front as a table: on a terminal, as plain text and as a pandas frame."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.policy import bits_name
from autocompress.report.view import caveats, details, format_score, headline
from autocompress.results import Entry, LayerChange, Results
from autocompress.units import format_duration, format_size

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

WIDE, MEDIUM = 120, 90
"""Columns of a terminal that shows everything, and of one that shows no intervals."""


def front_table(results: Results, width: int = WIDE) -> Table:
    """The front (or all that was measured, when nothing is within the budget), fastest first; then the original.

    `*` marks the best, `x` what is over the budget, `~` a noisy latency. A `width` below WIDE columns leaves out the intervals and how long
    each was trained, one below MEDIUM the policies in words too.
    """
    headers = ["", "id", "latency", "95 % interval", "speed-up", "validation", "test", "size", "trained", "policy"]
    kept = [h for h in headers if h not in _left_out(width)]
    table = plain_table(*kept)
    for entry in results.listed:
        best = entry.id == results.best
        cells = dict(zip(headers, _row(entry, best), strict=True))
        table.add_row(*(cells[header] for header in kept), style="bold green" if best else "")
    cells = dict(zip(headers, _original(results), strict=True))
    table.add_row(*(cells[header] for header in kept), style="dim")
    return table


def legend(results: Results, width: int = WIDE) -> str:
    """What the marks of the table mean, and where the rest is; empty where there is nothing to explain."""
    marks = {
        "* best": results.best is not None,
        "x over the budget": any(not entry.feasible for entry in results.listed),
        "~ noisy latency": any(entry.latency_s.noisy for entry in results.listed),
        "a wider terminal, or `autocompress explain RUN ID`, shows the policies": "policy" in _left_out(width),
    }
    return "; ".join(mark for mark, is_there in marks.items() if is_there)


def _left_out(width: int) -> tuple[str, ...]:
    narrow = ("95 % interval", "trained")
    return () if width >= WIDE else narrow if width >= MEDIUM else (*narrow, "policy")


def _original(results: Results) -> list[str]:
    original, latency = results.baseline, results.baseline.latency_s
    return [
        "", "original", format_duration(latency.median), _interval(latency.low, latency.high), "1.00x",
        format_score(original.val_score), format_score(original.test_score), format_size(original.size_bytes), "", "",
    ]  # fmt: skip


def plain_table(*columns: str, folding: Collection[str] = ()) -> Table:
    """An empty table in the house style: no frame, numbers to the right; where it is narrow the last column folds, and those of words.

    folding: names of columns that hold words. A number is never cut: one that lacks a digit would be another one.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        words = index < 2 or name in ("policy", "note", "reason", *folding)
        fixed = index < len(columns) - 1 and name not in folding
        table.add_column(name, justify="left" if words else "right", no_wrap=fixed, overflow="fold")
    return table


def _row(entry: Entry, best: bool) -> list[str]:
    latency = entry.latency_s
    return [
        "*" if best else "" if entry.feasible else "x",
        entry.id,
        format_duration(latency.median),
        _interval(latency.low, latency.high),
        f"{entry.speedup:.2f}x" + (" ~" if latency.noisy else ""),
        format_score(entry.val_score),
        format_score(entry.test_score),
        format_size(entry.size_bytes),
        entry.trained,
        entry.words,
    ]


def _interval(low: float, high: float) -> str:
    return f"{format_duration(low)} - {format_duration(high)}"


def summary(results: Results, run: Path | None = None) -> str:
    """What is best under the budget, in words; `run` as in `caveats`."""
    cautions = [f"  note: {text}" for text in caveats(results, run)]
    return "\n".join([headline(results), *(f"  {line}" for line in details(results)), *cautions])


def layer_table(entry: Entry) -> Table:
    """Each layer before and after, with its predicted time, and why it is not faster where it is not."""
    table = plain_table("layer", "kind", "channels", "bits", "time before", "after", "note")
    for layer in entry.layers:
        channels = f"{layer.teacher_channels} -> {'-' if layer.dropped else layer.channels}"
        channels += f" by {layer.rank}" if layer.rank else ""
        table.add_row(
            layer.name, layer.kind, channels, "-" if layer.dropped else str(layer.bits),
            _seconds(layer.teacher_latency_s), "-" if layer.dropped else _seconds(layer.latency_s), note(layer),
            style="dim" if layer.dropped else "",
        )  # fmt: skip
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else format_duration(value)


def note(layer: LayerChange) -> str:
    """What happened to a layer, and why it is not faster where it is predicted not to be."""
    if layer.dropped:
        return "removed with its block"
    changes = []
    if layer.channels != layer.teacher_channels:
        changes.append("narrower" if layer.channels < layer.teacher_channels else "wider")
    if layer.rank is not None:
        changes.append(f"two layers of rank {layer.rank}")
    if layer.bits == 8:
        changes.append("int8")
    elif layer.bits != 32:
        changes.append(f"{bits_name(layer.bits)}, computed in float32")
    before, after = layer.teacher_latency_s, layer.latency_s
    if before is not None and after is not None and after >= 0.97 * before:
        changes.append(_why_not_faster(layer))
    return ", ".join(changes) or "unchanged"


def _why_not_faster(layer: LayerChange) -> str:
    if layer.rank is not None:
        return "not faster: two layers take as long as one here"
    if layer.channels > layer.teacher_channels:
        return "not faster: more channels"
    if layer.channels < layer.teacher_channels:
        return "not faster: the kernel takes as long for fewer channels here"
    if layer.bits == 8:
        return "not faster: int8 gains nothing at this shape"
    return "not faster: same arithmetic as before"


FRAME_COLUMNS = (
    "id", "val_score", "test_score", "latency_s", "latency_low_s", "latency_high_s", "p95_s", "search_latency_s", "predicted_latency_s",
    "size_bytes", "steps", "training_s", "speedup", "feasible", "dominated", "best", "policy", "digest", "artifact",
)  # fmt: skip


def frame(results: Results) -> pd.DataFrame:
    """One row a measured policy, fastest first, with FRAME_COLUMNS; seconds and bytes, the policy in words."""
    import pandas as pd

    rows = [_frame_row(entry) | {"best": entry.id == results.best} for entry in results.points]
    table = pd.DataFrame(rows, columns=list(FRAME_COLUMNS))
    return table.sort_values("latency_s", kind="stable", ignore_index=True)


def _frame_row(entry: Entry) -> dict[str, Any]:
    latency, predicted = entry.latency_s, entry.predicted_latency_s
    return {
        "id": entry.id,
        "val_score": entry.val_score.value,
        "test_score": entry.test_score.value if entry.test_score else None,
        "latency_s": latency.median,
        "latency_low_s": latency.low,
        "latency_high_s": latency.high,
        "p95_s": latency.p95,
        "search_latency_s": entry.search_latency_s.median if entry.search_latency_s else None,
        "predicted_latency_s": predicted.value if predicted else None,
        "size_bytes": entry.size_bytes,
        "steps": entry.steps,
        "training_s": entry.training_s,
        "speedup": entry.speedup,
        "feasible": entry.feasible,
        "dominated": entry.dominated,
        "policy": entry.words,
        "digest": entry.digest,
        "artifact": entry.artifact,
    }
