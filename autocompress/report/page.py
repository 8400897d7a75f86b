"""The report of a search: report.html, one file that works offline, and pareto.png."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

from autocompress.ranking.scores import score_interval
from autocompress.report.figures import Figure, layers_figure, pareto_figure, prediction_figure, progress_figure
from autocompress.report.plots import pareto_png
from autocompress.report.templates import filled
from autocompress.report.view import caveats, format_score, headline
from autocompress.results import Entry, Results
from autocompress.system.run_folder import PARETO, REPORT, write_atomically
from autocompress.units import finite, format_duration, format_size

LEAST_SHARE = 0.005
"""Of the time; what took less is not listed."""


def write_report(results: Results, run: Path) -> None:
    """Write RUN/report.html and RUN/pareto.png. Raises RunFolderError when the folder cannot be written."""
    write_atomically(run / REPORT, render(results, run))
    pareto_png(results, run / PARETO)


def render(results: Results, run: Path) -> str:
    """The page. Everything that comes from a run is escaped; scripts and styles are inside."""
    from plotly.offline import get_plotlyjs

    return filled(
        "report.html.j2",
        results=results,
        run=shlex.quote(str(run)),
        headline=headline(results).replace(" %", "\N{NO-BREAK SPACE}%"),
        caveats=caveats(results, run),
        tiles=_tiles(results),
        figures=_script_json(figures(results)),
        shown=_shown(results),
        failures=Counter((f.stage, f.reason) for f in results.failures).most_common(),
        quality=_quality(results),
        ladder=_ladder(results),
        spent=_spent(results),
        plotly=get_plotlyjs(),
    )


def _shown(results: Results) -> list[Entry]:
    """Policies whose layers can be looked at: the best first, then the front."""
    best = results.best_entry
    rest = [entry for entry in results.listed if entry.id != results.best]
    return [entry for entry in [*([best] if best else []), *rest] if entry.layers]


def figures(results: Results) -> dict[str, Figure]:
    """What there is to draw: `pareto`, `progress`, `prediction`, and the layers of each policy that is shown, by its id."""
    drawn = {"pareto": pareto_figure(results)}
    if results.progress:
        drawn["progress"] = progress_figure(results)
    if any(entry.predicted_latency_s for entry in results.points):
        drawn["prediction"] = prediction_figure(results)
    return drawn | {entry.id: layers_figure(entry) for entry in _shown(results)}


def _script_json(value: object) -> str:
    """JSON that is safe inside a script element: `<`, `>` and `&` cannot end it or start a comment."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _tiles(results: Results) -> list[dict[str, str]]:
    """Four numbers of the best policy: name, value, the fine print, what it was."""
    best, original = results.best_entry, results.baseline
    if best is None:
        return []
    latency = best.latency_s
    spread = f"95 % interval {format_duration(latency.low)} to {format_duration(latency.high)}"
    score = best.test_score or best.val_score
    before = original.test_score if best.test_score else original.val_score
    interval = score_interval(score)
    split = "test" if best.test_score else "validation"
    accuracy = f"95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f} %" if interval else f"n = {score.n}"
    smaller = f"{original.size_bytes / max(best.size_bytes, 1):.1f}× smaller"
    return [
        _tile("Latency", format_duration(latency.median), spread, format_duration(original.latency_s.median)),
        _tile("Speed-up", f"{best.speedup:.2f}×", f"p95 {format_duration(latency.p95)}, n = {latency.n}", "1.00×"),
        _tile(f"{score.name.capitalize()} ({split})", format_score(score), accuracy, format_score(before)),
        _tile("File size", format_size(best.size_bytes), smaller, format_size(original.size_bytes)),
    ]


def _tile(name: str, value: str, note: str, before: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "before": before}


def _quality(results: Results) -> list[tuple[str, str]]:
    """How far predicted latencies could be trusted."""
    error, spearman = results.prediction.median_error, results.prediction.spearman
    pairs = [("median error", f"{100 * error:.1f} %")] if error is not None else []
    return pairs + ([("rank correlation", f"{spearman:.3f}")] if spearman is not None else [])


def _ladder(results: Results) -> list[tuple[str, str]]:
    """How far each step of the search could be trusted to rank policies as the next one did."""
    names = {
        "appraised": "structures scored untrained",
        "foreseen_appraised_spearman": "rank correlation of the sensitivity scan and training-free scores, at the same latency",
        "appraised_short_spearman": "rank correlation of training-free scores and short training, at the same latency",
        "short_full_spearman": "rank correlation of short and full training",
    }
    told = results.ladder.model_dump(exclude_unset=True)
    pairs = [(names.get(key, key.replace("_", " ")), _number(value)) for key, value in told.items()]
    return [(name, value) for name, value in pairs if value]


def _spent(results: Results) -> list[tuple[str, str]]:
    """Shares of the time by what it was spent on; what is none of that was the search's own."""
    names = {
        "train": "training",
        "measure": "measuring",
        "appraise": "scoring untrained students",
        "reconstruct": "layer-wise reconstruction",
        "score": "scoring",
        "export": "exporting",
        "teach": "answers of the original",
        "calibrate": "operators measured ahead",
        "prepare": "loading and tracing",
    }
    spent = results.spent_s
    if not spent or not results.elapsed_s:
        return []
    shares = {names.get(work, work): seconds / results.elapsed_s for work, seconds in spent.items()}
    shares["the search itself"] = max(0.0, 1.0 - sum(shares.values()))
    return [(name, f"{100 * share:.0f} %") for name, share in sorted(shares.items(), key=lambda pair: -pair[1]) if share >= LEAST_SHARE]


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
