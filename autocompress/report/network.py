"""A network as a page: its operators in a column, the tensors between them as lines beside it, in the colours of their channel groups."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocompress.report.templates import filled
from autocompress.workload import OutlineStep

ROW, LANE, DOT = 30, 13, 4.2
"""Height of a row, distance of lanes, radius of an operator, in pixels."""
GOLDEN_ANGLE = 0.381966
"""Of the circle of hues: neighbours that are so far apart look different, however many there are."""
FIXED, NONE = "var(--outline)", "var(--faint)"
"""Colours of channels that stay, and of what has none."""


@dataclass(frozen=True)
class Row:
    """The lines beside one step: (lane, step that made it) of the tensors that pass, and of those that it reads; the lane of its own."""

    passing: tuple[tuple[int, int], ...]
    read: tuple[tuple[int, int], ...]
    lane: int
    is_read: bool


def lay_out(steps: Sequence[OutlineStep]) -> list[Row]:
    """A lane for each tensor, from the step that makes it to the last that reads it; the leftmost that is free."""
    last = {source: reader for reader, step in enumerate(steps) for source in step.inputs}
    lanes: list[int | None] = []
    rows = []
    for number, step in enumerate(steps):
        where = {made: lane for lane, made in enumerate(lanes) if made is not None}
        lanes = [None if made is not None and last.get(made) == number else made for made in lanes]
        lane = next((lane for lane, made in enumerate(lanes) if made is None), len(lanes))
        passing = tuple((lane, made) for lane, made in enumerate(lanes) if made is not None)
        rows.append(Row(passing, tuple((where[source], source) for source in step.inputs), lane, number in last))
        if number in last:
            lanes[lane : lane + 1] = [number]
    return rows


def drawing(row: Row, colours: Sequence[str], number: int) -> str:
    """The lines as elements of SVG."""
    middle, own = ROW / 2, _x(row.lane)
    parts = [f'<path d="M{_x(lane)} 0V{ROW}" stroke="{colours[made]}"/>' for lane, made in row.passing]
    for lane, made in row.read:
        start = _x(lane)
        way = f"V{middle}" if lane == row.lane else f"C{start} {middle} {own} 0 {own} {middle}"
        parts.append(f'<path d="M{start} 0{way}" stroke="{colours[made]}"/>')
    if row.is_read:
        parts.append(f'<path d="M{own} {middle}V{ROW}" stroke="{colours[number]}"/>')
    parts.append(f'<circle cx="{own}" cy="{middle}" r="{DOT}" fill="{colours[number]}"/>')
    return "".join(parts)


def network_page(content: Mapping[str, Any]) -> str:
    """The page of what `inspect_model` tells."""
    steps = [OutlineStep.model_validate(step) for step in content["steps"]]
    groups = {group["name"]: group for group in content["channel_groups"]}
    hues = {name: _hue(index) for index, name in enumerate(name for name, group in groups.items() if group["can_change"])}
    colours = [NONE if step.group is None else hues.get(step.group, FIXED) for step in steps]
    rows = lay_out(steps)
    costs = {key: [getattr(step, key) or 0 for step in steps] for key in ("params", "macs", "latency_s")}
    totals, most = {key: sum(values) for key, values in costs.items()}, {key: max(values) for key, values in costs.items()}
    return filled(
        "network.html.j2",
        content=content,
        groups=groups,
        hues=hues,
        totals=totals,
        height=ROW,
        width=LANE * (1 + max((max([row.lane, *(lane for lane, _ in row.passing)]) for row in rows), default=0)) + LANE,
        lines=[
            {
                "step": step,
                "colour": colour,
                "drawing": drawing(row, colours, number),
                "begins_block": step.block is not None and (number == 0 or steps[number - 1].block != step.block),
                "lengths": {key: values[number] / most[key] for key, values in costs.items() if most[key]},
                "share": 100 * costs["latency_s"][number] / max(totals["latency_s"], 1e-12),
            }
            for number, (step, row, colour) in enumerate(zip(steps, rows, colours, strict=True))
        ],
    )


def _x(lane: int) -> int:
    return LANE * lane + LANE


def _hue(index: int) -> str:
    red, green, blue = colorsys.hls_to_rgb((0.6 + GOLDEN_ANGLE * index) % 1.0, 0.52, 0.6)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
