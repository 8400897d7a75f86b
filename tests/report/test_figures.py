"""What the report draws: every mark that a reader relies on."""

from __future__ import annotations

import pytest

from autocompress.ranking.scores import score_interval
from autocompress.report.figures import _decimals, layers_figure, pareto_figure, prediction_figure, progress_figure
from autocompress.report.page import write_report
from autocompress.results import Results


def traces(figure):
    return {trace.get("name", ""): trace for trace in figure["data"]}


def test_the_front_has_whiskers_and_words_and_the_rest_is_grey(results):
    drawn = traces(pareto_figure(results))
    front, best = drawn["front"], drawn["best within the budget"]
    assert {*front["customdata"], *best["customdata"]} == {entry.id for entry in results.front}
    assert best["customdata"] == [results.best]
    for trace in (front, best):
        by_id = {entry.id: entry for entry in results.front}
        entries = [by_id[id] for id in trace["customdata"]]
        assert trace["error_x"]["visible"]
        assert trace["error_x"]["array"] == [e.latency_s.high - e.latency_s.median for e in entries]
        assert trace["error_x"]["arrayminus"] == [e.latency_s.median - e.latency_s.low for e in entries]
        assert trace["error_y"]["visible"]
        intervals = [score_interval(e.val_score) for e in entries]
        assert trace["error_y"]["array"] == pytest.approx(
            [high - e.val_score.value for e, (_, high) in zip(entries, intervals, strict=True)]
        )
        assert min(trace["error_y"]["arrayminus"]) > 0
        for entry, text in zip(entries, trace["text"], strict=True):
            assert entry.words.split(";")[0] in text.replace("<br>", " ")
    dominated, over = drawn["dominated"], drawn["over the budget"]
    assert dominated["marker"]["color"] == over["marker"]["color"] == "$faint"
    assert front["marker"]["color"] != "$faint"
    limit = results.budget.latency_s
    assert max(dominated["x"]) <= limit < min(over["x"])


def test_the_original_is_a_star_with_whiskers(results):
    star, latency = traces(pareto_figure(results))["original"], results.baseline.latency_s
    assert star["marker"]["symbol"] == "star"
    assert star["x"] == [latency.median]
    assert star["error_x"]["array"] == [latency.high - latency.median]


def test_the_budget_is_a_line_with_its_name_and_what_is_beyond_it_is_shaded(results):
    layout = pareto_figure(results)["layout"]
    shade, line = layout["shapes"]
    assert line["x0"] == line["x1"] == shade["x0"] == results.budget.latency_s
    assert shade["x1"] > max(entry.latency_s.high for entry in results.points)
    assert [annotation["text"] for annotation in layout["annotations"]] == ["budget 10 ms"]


@pytest.mark.parametrize(
    ("limits", "shaded", "said"),
    [
        ({"latency_s": 0.01}, True, "shaded area"),
        ({"size_bytes": 4_000_000}, False, "no line in this plot"),
        ({"p95_s": 0.01}, False, "no line in this plot"),
        ({}, False, "and on the front of the score."),
    ],
    ids=["latency", "size", "p95", "none"],
)
def test_the_report_speaks_of_the_budget_as_it_is_drawn(content, tmp_path, limits, shaded, said):
    content["budget"] = dict.fromkeys(content["budget"]) | limits
    assert bool(pareto_figure(Results.read(content))["layout"]["shapes"]) == shaded
    write_report(Results.read(content), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert said in page
    assert ("shaded area" in page) == shaded


def test_layers_show_bits_channels_and_what_was_removed(results):
    entry = next(e for e in results.front if any(layer.dropped for layer in e.layers))
    drawn = traces(layers_figure(entry))
    gone = [layer.dropped for layer in entry.layers]
    outline = drawn["original"]
    assert outline["y"] == [layer.teacher_channels for layer in entry.layers]
    assert [bool(shape) for shape in outline["marker"]["pattern"]["shape"]] == gone
    bars = [trace for name, trace in drawn.items() if name != "original"]
    assert sorted(x for trace in bars for x in trace["x"]) == [index for index, dropped in enumerate(gone) if not dropped]
    for trace in bars:
        assert trace["y"] == [entry.layers[x].channels for x in trace["x"]]


def test_progress_rises_to_all_of_the_hypervolume(results):
    (line,) = progress_figure(results)["data"]
    assert line["y"][0] == 0.0
    assert line["y"][-1] == 1.0
    assert line["x"] == sorted(line["x"])


def test_predictions_stand_with_their_intervals_beside_a_diagonal(results):
    diagonal, dots = prediction_figure(results)["data"]
    assert diagonal["x"] == diagonal["y"]
    predicted = [e.predicted_latency_s for e in results.points if e.predicted_latency_s is not None]
    assert dots["y"] == [p.value for p in predicted]
    assert dots["error_y"]["array"] == [p.high - p.value for p in predicted]


@pytest.mark.parametrize("width", [0.9, 0.061, 0.059, 0.02, 0.0061, 0.003, 0.0007])
def test_no_two_ticks_of_a_score_read_alike(width):
    """Plotly chooses four to six of them, at round numbers."""
    step = width / 6
    texts = [f"{0.99 + index * step:.{_decimals(width)}%}" for index in range(6)]
    assert len(set(texts)) == 6
