"""Interactive figures of the report, as plain plotly JSON.

Their colours are names such as `"$accent"`, which the page replaces by its own CSS variables, so that a figure follows the light and the
dark scheme; elsewhere `in_colour` replaces them by those of the light one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import Any

from autocompress.policy import bits_name
from autocompress.ranking.scores import is_share, score_interval
from autocompress.records import Measurement
from autocompress.report.axes import Axis, time_ticks
from autocompress.report.view import format_score
from autocompress.results import Entry, ProgressPoint, Results
from autocompress.units import format_duration, format_size

Figure = dict[str, Any]
Spread = tuple[list[float], list[float]]
"""How far intervals reach below and above what they belong to."""

LIGHT = {
    "accent": "#3257d6", "area": "rgba(50, 87, 214, .12)", "bad": "#c92a2a", "best": "#e8590c", "card": "#ffffff", "faint": "#aeb6c4",
    "float": "#98a2b3", "grid": "#eef0f4", "half": "#2f9e8f", "hatch": "rgba(135, 145, 163, .08)", "ink": "#14171f", "line": "#dfe3ea",
    "low": "#8a5cd6", "muted": "#5d6677", "outline": "#8791a3", "shade": "rgba(201, 42, 42, .055)", "whisker": "rgba(50, 87, 214, .4)",
    "font": 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Inter", "Helvetica Neue", Arial, sans-serif',
}  # fmt: skip
"""The light scheme, of the page too; its dark one stands in templates/report.html.j2."""
AIR = 0.08
"""Of the score axis beyond the outermost points, as a share of their span."""


def in_colour(figure: Any) -> Any:
    """The figure with the colours of the light scheme instead of their names."""
    if isinstance(figure, dict):
        return {key: in_colour(value) for key, value in figure.items()}
    if isinstance(figure, (list, tuple)):
        return [in_colour(value) for value in figure]
    return LIGHT.get(figure[1:], figure) if isinstance(figure, str) and figure.startswith("$") else figure


def _latency_axis(axis: Axis, title: str) -> Figure:
    limits = [math.log10(axis.low), math.log10(axis.high)] if axis.log else [axis.low, axis.high]
    kind = "log" if axis.log else "linear"
    return _axis(title) | {"type": kind, "range": limits, "tickvals": list(axis.ticks), "ticktext": axis.texts}


def _axis(title: str) -> Figure:
    return {
        "title": {"text": title, "standoff": 12, "font": {"size": 13}},
        "gridcolor": "$grid",
        "linecolor": "$line",
        "tickcolor": "$line",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
    }


def _layout(**parts: Any) -> Figure:
    """The layout that all figures share, with `parts` on top."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "$font", "size": 13, "color": "$muted"},
        "hoverlabel": {
            "bgcolor": "$card",
            "bordercolor": "$line",
            "font": {"family": "$font", "color": "$ink", "size": 12.5},
            "align": "left",
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12.5}},
        "margin": {"l": 64, "r": 24, "t": 36, "b": 56},
        "hovermode": "closest",
        **parts,
    }


# -- the front --------------------------------------------------------------------------------------------------------


def pareto_figure(results: Results) -> Figure:
    """Validation score against measured latency: front, dominated points, the original, the budget."""
    shown = list(results.front)
    others = [entry for entry in results.points if entry.id not in {e.id for e in shown}]
    axis = Axis.of(latencies(results))
    data = [
        _points([e for e in others if e.feasible], "dominated", "$faint", 9, "circle"),
        _points([e for e in others if not e.feasible], "over the budget", "$faint", 8, "x-thin-open"),
        _front_line(results, axis),
        _points([e for e in shown if e.id != results.best], "front", "$accent", 10, "circle", errors=True),
        _points([e for e in shown if e.id == results.best], _best_name(results), "$best", 17, "circle", errors=True),
        _original(results),
    ]
    shapes, annotations = _budget_marks(results, axis)
    layout = _layout(
        xaxis=_latency_axis(axis, "measured latency"),
        yaxis=_score_axis(results),
        shapes=shapes,
        annotations=annotations,
        height=520,
    )
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def _best_name(results: Results) -> str:
    return "best within the budget" if results.has_budget else "most accurate"


def latencies(results: Results) -> list[float]:
    """All that the latency axis has to hold, in seconds."""
    values = [value for e in results.points for value in (e.latency_s.low, e.latency_s.high) if value > 0]
    limit = results.budget.latency_s
    return [*values, results.baseline.latency_s.median, *([limit] if limit else [])]


def percent(results: Results) -> bool:
    """Whether the score axis is in percent."""
    scores = [e.val_score for e in results.points]
    return bool(scores) and all(is_share(score) for score in scores)


def _score_axis(results: Results) -> Figure:
    if not results.points:
        return _axis("score")
    score = results.points[0].val_score
    name = f"{escape(score.name)} on the validation set"
    axis = _axis(name if score.direction == "maximize" else f"{name} (lower is better)")
    low, high = score_limits(results)
    axis["range"] = [low, high] if score.direction == "maximize" else [high, low]
    return axis | ({"tickformat": f".{_decimals(high - low)}%"} if percent(results) else {})


def _decimals(width: float) -> int:
    """Of percents on an axis that shows so much of them, with some five ticks: no two of these may read alike."""
    return next((decimals for decimals, least in ((0, 0.06), (1, 0.006)) if width >= least), 2)


def score_limits(results: Results) -> tuple[float, float]:
    """What of the score axis is shown at first: the front and the original, and other points that are not far off."""
    main = [e.val_score.value for e in results.front] or [e.val_score.value for e in results.points]
    if results.baseline.val_score is not None:
        main.append(results.baseline.val_score.value)
    low, high = min(main), max(main)
    span = (high - low) or 0.1 * abs(high) or 1.0
    near = [e.val_score.value for e in results.points if low - span <= e.val_score.value <= high + span]
    bottom, top = min([low, *near]) - AIR * span, max([high, *near]) + AIR * span
    return bottom, min(top, 1.0 + 0.5 * AIR * span) if percent(results) else top


def _points(entries: Sequence[Entry], name: str, color: str, size: int, symbol: str, *, errors: bool = False) -> Figure:
    latencies = [e.latency_s for e in entries]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [latency.median for latency in latencies],
        "y": [e.val_score.value for e in entries],
        "error_x": _whiskers(latency_spread(latencies), color) | {"visible": errors},
        "error_y": _whiskers(score_spread(entries), color) | {"visible": errors},
        "marker": {
            "size": size,
            "color": color,
            "symbol": symbol,
            "line": {"width": 1.5, "color": "$card" if symbol == "circle" else color},
        },
        "text": [hover(e) for e in entries],
        "customdata": [e.id for e in entries],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _whiskers(spread: Spread, color: str) -> Figure:
    below, above = spread
    return {"type": "data", "arrayminus": below, "array": above, "color": color, "thickness": 1.4, "width": 4}


def latency_spread(latencies: Sequence[Measurement]) -> Spread:
    """Of the 95 % intervals of these medians."""
    below = [latency.median - latency.low for latency in latencies]
    return below, [latency.high - latency.median for latency in latencies]


def score_spread(entries: Sequence[Entry]) -> Spread:
    """Of the 95 % intervals of the validation scores; 0 of scores that have none."""
    scores = [e.val_score for e in entries]
    intervals = [score_interval(score) or (score.value, score.value) for score in scores]
    below = [max(0.0, score.value - low) for score, (low, _) in zip(scores, intervals, strict=True)]
    return below, [max(0.0, high - score.value) for score, (_, high) in zip(scores, intervals, strict=True)]


def hover(entry: Entry) -> str:
    """The policy in words and its numbers, as plotly's subset of HTML."""
    latency = entry.latency_s
    words = "<br>".join(escape(line) for line in wrap(entry.words, 56))
    test = f" ({format_score(entry.test_score)} on the test set)" if entry.test_score else ""
    lines = [
        f"<b>{escape(entry.id)}</b>  {entry.speedup:.2f}x",
        words,
        f"{escape(entry.val_score.name)} {format_score(entry.val_score)}{test}",
        f"{format_duration(latency.median)}, 95 % interval {format_duration(latency.low)} to {format_duration(latency.high)}",
        f"p95 {format_duration(latency.p95)}, {format_size(entry.size_bytes)}",
    ]
    if entry.trained:
        lines.append(f"trained for {entry.trained} in {format_duration(entry.training_s)}" if entry.steps else entry.trained)
    if entry.search_latency_s is not None:
        lines.append(f"{format_duration(entry.search_latency_s.median)} when the search measured it for the first time")
    return "<br>".join([*lines, *(["over the budget"] if not entry.feasible else [])])


def _front_line(results: Results, axis: Axis) -> Figure:
    """The front as a staircase: what is reached at each latency."""
    entries = sorted(results.front, key=lambda e: e.latency_s.median)
    x, y = [e.latency_s.median for e in entries], reached(entries)
    if entries:
        x, y = [*x, front_end(results, axis)], [*y, y[-1]]
    line = {"color": "$accent", "width": 2, "shape": "hv"}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "opacity": 0.55,
            "hoverinfo": "skip", "showlegend": False}  # fmt: skip


def reached(entries: Sequence[Entry]) -> list[float]:
    """The best score up to each of the entries, fastest first."""
    scores = [entry.val_score for entry in entries]
    return [max(scores[: number + 1], key=lambda score: score.gain).value for number in range(len(scores))]


def front_end(results: Results, axis: Axis) -> float:
    """Where the staircase ends: at the budget when nothing of the front is over it."""
    limit = results.budget.latency_s
    if not limit or not all(entry.feasible for entry in results.front):
        return axis.high
    return max([limit, *(entry.latency_s.median for entry in results.front)])  # of a relative budget the limit has moved since


def _original(results: Results) -> Figure:
    original = results.baseline
    known = [original.val_score] if original.val_score is not None else []
    text = (
        f"<b>original</b><br>{format_score(original.val_score)}, {format_duration(original.latency_s.median)}, "
        f"{format_size(original.size_bytes)}"
    )
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "original",
        "x": [original.latency_s.median for _ in known],
        "y": [score.value for score in known],
        "error_x": _whiskers(latency_spread([original.latency_s for _ in known]), "$ink"),
        "marker": {"symbol": "star", "size": 17, "color": "$ink", "line": {"width": 1.5, "color": "$card"}},
        "text": [text],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _budget_marks(results: Results, axis: Axis) -> tuple[list[Figure], list[Figure]]:
    limit = results.budget.latency_s
    if limit is None:
        return [], []
    common = {"yref": "paper", "y0": 0, "y1": 1, "x0": limit, "layer": "below"}
    shade = {"type": "rect", "x1": axis.high * 100, "fillcolor": "$shade", "line": {"width": 0}, **common}
    line = {"type": "line", "x1": limit, "line": {"color": "$bad", "width": 1.5, "dash": "dash"}, **common}
    label = {
        "x": math.log10(limit) if axis.log else limit,
        "y": 0,
        "yref": "paper",
        "text": f"budget {format_duration(limit)}",
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
        "xshift": 6,
        "yshift": 6,
        "font": {"color": "$bad", "size": 12.5},
    }
    return [shade, line], [label]


# -- one policy, the search, the predictions --------------------------------------------------------------------------


_BITS_COLOR = {32: "$float", 16: "$half", 8: "$accent"}


def layers_figure(entry: Entry) -> Figure:
    """Channels by depth: bars of the student in the colour of their bits, before the teacher's outline."""
    layers = entry.layers
    depth = list(range(len(layers)))
    outline = {
        "type": "bar",
        "name": "original",
        "x": depth,
        "y": [layer.teacher_channels for layer in layers],
        "width": 0.86,
        "marker": {
            "color": ["$hatch" if layer.dropped else "rgba(0,0,0,0)" for layer in layers],
            "line": {"color": "$outline", "width": 1},
            "pattern": {"shape": ["/" if layer.dropped else "" for layer in layers], "fgcolor": "$outline",
                        "bgcolor": "rgba(0,0,0,0)", "size": 6, "solidity": 0.22, "fillmode": "overlay"},
        },
        "hovertext": [f"<b>{escape(layer.name)}</b><br>{layer.teacher_channels} channels"
                      + ("<br>removed" if layer.dropped else "") for layer in layers],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip
    bars = [_bits_bars(entry, bits) for bits in sorted({e.bits for e in layers if not e.dropped})]
    layout = _layout(
        barmode="overlay",
        bargap=0.1,
        xaxis=_axis("layers by depth") | _layer_ticks([layer.name for layer in layers]) | {"showgrid": False},
        yaxis=_axis("output channels") | {"rangemode": "tozero"},
        height=340,
    )
    return {"data": [*bars, outline], "layout": layout}


def _bits_bars(entry: Entry, bits: int) -> Figure:
    chosen = [(index, e) for index, e in enumerate(entry.layers) if e.bits == bits and not e.dropped]
    return {
        "type": "bar",
        "name": bits_name(bits),
        "x": [index for index, _ in chosen],
        "y": [e.channels for _, e in chosen],
        "width": 0.62,
        "marker": {"color": _BITS_COLOR.get(bits, "$low"), "line": {"width": 0}},
        "hovertext": [f"<b>{escape(e.name)}</b><br>{e.channels} of {e.teacher_channels} channels, {bits_name(bits)}"
                      + (f", rank {e.rank}" if e.rank else "") for _, e in chosen],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }  # fmt: skip


def _layer_ticks(names: Sequence[str]) -> Figure:
    """Ticks that fit: each layer's name up to 30 layers, then every n-th."""
    step = math.ceil(len(names) / 30) or 1
    chosen = range(0, len(names), step)
    texts = [escape(names[index]) if len(names[index]) <= 24 else "…" + escape(names[index][-23:]) for index in chosen]
    return {"tickvals": list(chosen), "ticktext": texts, "tickangle": -50, "tickfont": {"size": 10.5}}


def progress_figure(results: Results) -> Figure:
    """Hypervolume of the front by time, as a share of the largest: it shrinks where a file turns out to be over the budget."""
    points = results.progress
    largest = max((p.hypervolume for p in points), default=0.0) or 1.0
    ticks = time_ticks(max((p.elapsed_s for p in points), default=1.0))
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [0.0, *(p.elapsed_s for p in points)],
        "y": [0.0, *(p.hypervolume / largest for p in points)],
        "line": {"color": "$accent", "width": 2, "shape": "hv"},
        "fill": "tozeroy",
        "fillcolor": "$area",
        "text": ["start", *(_progress_words(p) for p in points)],
        "hovertemplate": "%{y:.1%} of the largest hypervolume<br>%{text}<extra></extra>",
    }
    layout = _layout(
        xaxis=_axis("time") | {"tickvals": ticks, "ticktext": [format_duration(t) if t else "0" for t in ticks]},
        yaxis=_axis("hypervolume, largest = 100 %") | {"tickformat": ".0%", "range": [0, 1.06]},
        height=330,
        margin={"l": 64, "r": 16, "t": 10, "b": 56},
        showlegend=False,
    )
    return {"data": [trace], "layout": layout}


def _progress_words(point: ProgressPoint) -> str:
    return f"{point.trials} trials" + (f"<br>best {point.best_val:.4g}" if point.best_val is not None else "")


def prediction_figure(results: Results) -> Figure:
    """Predicted against measured latency; perfect predictions lie on the diagonal."""
    pairs = [(e, e.predicted_latency_s) for e in results.points if e.predicted_latency_s is not None]
    values = [v for e, p in pairs for v in (e.latency_s.median, p.low, p.high) if v > 0]
    axis = Axis.of(values or [1e-3])
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [e.latency_s.median for e, _ in pairs],
        "y": [p.value for _, p in pairs],
        "error_y": {
            "type": "data",
            "array": [p.high - p.value for _, p in pairs],
            "arrayminus": [p.value - p.low for _, p in pairs],
            "color": "$whisker",
            "thickness": 1.2,
            "width": 0,
        },
        "marker": {"size": 8, "color": "$accent", "line": {"width": 1, "color": "$card"}},
        "text": [f"<b>{escape(e.id)}</b><br>predicted {format_duration(p.value)}<br>measured "
                 f"{format_duration(e.latency_s.median)}" for e, p in pairs],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    start = axis.low or 1e-9
    diagonal = {"type": "scatter", "mode": "lines", "x": [start, axis.high], "y": [start, axis.high],
                "line": {"color": "$outline", "width": 1.2, "dash": "dot"}, "hoverinfo": "skip"}  # fmt: skip
    layout = _layout(
        xaxis=_latency_axis(axis, "measured latency"),
        yaxis=_latency_axis(axis, "predicted latency"),
        height=330,
        margin={"l": 64, "r": 16, "t": 10, "b": 56},
        showlegend=False,
    )
    return {"data": [diagonal, dots], "layout": layout}
