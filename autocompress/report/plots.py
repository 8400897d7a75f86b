"""The Pareto plot as a PNG, drawn with matplotlib's own canvas: no display, no global state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from autocompress.report.axes import Axis
from autocompress.report.figures import LIGHT, front_end, latencies, latency_spread, percent, reached, score_limits, score_spread
from autocompress.report.view import headline
from autocompress.results import Entry, Results
from autocompress.system.run_folder import write_atomically
from autocompress.units import format_duration

INK, MUTED, FAINT, GRID, LINE, ACCENT, BEST, BAD = (
    LIGHT[name] for name in ("ink", "muted", "faint", "grid", "line", "accent", "best", "bad")
)


def pareto_png(results: Results, path: Path) -> None:
    """Draw score against measured latency of all measured policies into the file `path`."""
    figure = Figure(figsize=(9.6, 5.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axis = Axis.of(latencies(results))
    _style(axes, axis, results)
    _budget(axes, axis, results)
    _entries(axes, axis, results)
    original = results.baseline
    if original.val_score is not None:
        point = (original.latency_s.median, original.val_score.value)
        axes.scatter(*point, marker="*", s=260, color=INK, edgecolor="white", zorder=6, label="original")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9.5, labelcolor=MUTED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _style(axes: Any, axis: Axis, results: Results) -> None:
    axes.set_xscale("log" if axis.log else "linear")
    axes.set_xlim(axis.low, axis.high)
    axes.xaxis.set_major_locator(FixedLocator(axis.ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_duration(value) if value else "0"))
    axes.set_xlabel("measured latency", color=MUTED)
    axes.set_title(headline(results).replace("$", r"\$"), loc="left", fontsize=12, color=INK, pad=14, wrap=True)
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    if results.points:
        score = results.points[0].val_score
        low, high = score_limits(results)
        axes.set_ylim(*((low, high) if score.direction == "maximize" else (high, low)))
        lower = "" if score.direction == "maximize" else " (lower is better)"
        axes.set_ylabel(f"{score.name} on the validation set{lower}".replace("$", r"\$"), color=MUTED)
    if percent(results):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _budget(axes: Any, axis: Axis, results: Results) -> None:
    limit = results.budget.latency_s
    if limit is None:
        return
    axes.axvspan(limit, axis.high, color=BAD, alpha=0.05, linewidth=0)
    axes.axvline(limit, color=BAD, linestyle="--", linewidth=1.3)
    axes.annotate(
        f"budget {format_duration(limit)}", (limit, 0), xycoords=("data", "axes fraction"), xytext=(-6, 6),
        textcoords="offset points", color=BAD, fontsize=9.5, rotation=90, ha="right", va="bottom",  # the legend lies on its right
    )  # fmt: skip


def _entries(axes: Any, axis: Axis, results: Results) -> None:
    front = sorted(results.front, key=lambda e: e.latency_s.median)
    ids = {entry.id for entry in front}
    others = [entry for entry in results.points if entry.id not in ids]
    for name, marker, chosen in (
        ("dominated", "o", [e for e in others if e.feasible]),
        ("over the budget", "x", [e for e in others if not e.feasible]),
    ):
        if chosen:
            axes.scatter(*_xy(chosen), s=30, color=FAINT, marker=marker, linewidth=1.2, label=name, zorder=3)
    if front:
        x, y = _xy(front)[0], reached(front)
        axes.step([*x, front_end(results, axis)], [*y, y[-1]], where="post", color=ACCENT, alpha=0.5, linewidth=1.8, zorder=4)
    for name, color, size, chosen in (
        ("front", ACCENT, 52, [e for e in front if e.id != results.best]),
        ("best within the budget" if results.has_budget else "most accurate", BEST, 130,
         [e for e in front if e.id == results.best]),
    ):  # fmt: skip
        if chosen:
            x, y = _xy(chosen)
            across = latency_spread([e.latency_s for e in chosen])
            axes.errorbar(x, y, xerr=across, yerr=score_spread(chosen), fmt="none", ecolor=color, elinewidth=1.3, capsize=2.5, zorder=4)
            axes.scatter(x, y, s=size, color=color, edgecolor="white", linewidth=1.2, label=name, zorder=5)


def _xy(entries: list[Entry]) -> tuple[list[float], list[float]]:
    return [e.latency_s.median for e in entries], [e.val_score.value for e in entries]
