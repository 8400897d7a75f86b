from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autocompress.commands.terminal import rendered
from autocompress.ranking.scores import score_interval
from autocompress.records import Score
from autocompress.report.axes import Axis, time_ticks
from autocompress.report.tables import FRAME_COLUMNS, frame, front_table, layer_table, legend, note, summary
from autocompress.report.view import caveats, details, format_score, headline, latency_line
from autocompress.results import LayerChange, Results


def without_best(content):
    """Every point over the budget."""
    points = [point | {"feasible": False} for point in content["points"]]
    return Results.read(content | {"front": [], "points": points, "best": None})


def test_the_headline_is_the_answer(results):
    speed, score = results.best_entry.speedup, 100 * results.best_entry.test_score.value
    expected = f"{speed:.2f} times faster than the original at {score:.2f} % accuracy, within the budget (latency 10 ms)."
    assert headline(results) == expected


def test_headlines_when_there_is_no_best(content):
    assert headline(Results.read(content | {"front": [], "points": [], "best": None})) == "No policy has been measured."
    missed = without_best(content)
    fastest = min(point["latency_s"]["high"] for point in content["points"])
    assert headline(missed).endswith(f"the fastest policy took {1e3 * fastest:.3g} ms.")
    assert details(missed) == []


@pytest.mark.parametrize(
    ("differing", "told"), [(3, "decides as the network that it was exported from on 997 of 1000 inputs"), (None, "by 2 % at most")]
)
def test_how_far_the_file_is_what_was_trained_is_told(content, differing, told):
    parity = {"difference": 0.2, "largest": 10.0, "differing": differing, "n": 1000}
    points = [point | {"parity": parity} for point in content["points"]]
    assert told in summary(Results.read(content | {"points": points, "front": [point | {"parity": parity} for point in content["front"]]}))


def test_a_slower_best_is_not_called_faster(content):
    point = content["points"][0] | {"speedup": 0.5}
    assert "0.50 times the speed of" in headline(Results.read(content | {"points": [point], "best": point["id"]}))


def test_the_table_lists_the_front_fastest_first_and_then_the_original(results):
    lines = rendered(front_table(results)).splitlines()
    rows = [line.strip() for line in lines if any(entry.id in line for entry in results.listed)]
    assert len(rows) == len(results.front)
    latencies = [entry.latency_s.median for entry in results.listed]
    assert latencies == sorted(latencies)
    assert [row for row in rows if row.startswith("*")] == [row for row in rows if f" {results.best} " in row]
    assert len([row for row in rows if row.startswith("x")]) == sum(not entry.feasible for entry in results.front)
    assert "original" in lines[-1] and "1.00x" in lines[-1]


def test_a_table_without_front_lists_what_was_measured(content):
    missed = without_best(content)
    assert len(missed.listed) == len(content["points"])
    assert rendered(front_table(missed)).count("\n x ") == len(content["points"])


@pytest.mark.parametrize(("width", "columns"), [(180, 10), (100, 8), (70, 7)])
def test_a_narrow_terminal_shows_fewer_columns(results, width, columns):
    assert len(front_table(results, width).columns) == columns


def test_marks_are_explained_where_there_are_any(content):
    quiet = [point | {"feasible": True, "latency_s": point["latency_s"] | {"noisy": False}} for point in content["points"]]
    plain = Results.read(content | {"points": quiet, "front": quiet, "best": None})
    assert legend(plain) == ""
    assert "explain RUN ID" in legend(plain, 70)
    first = quiet[0] | {"feasible": False, "latency_s": quiet[0]["latency_s"] | {"noisy": True}}
    marked = Results.read(content | {"points": [first, *quiet[1:]], "front": [first, *quiet[1:]], "best": quiet[1]["id"]})
    assert legend(marked) == "* best; x over the budget; ~ noisy latency"


def test_how_long_each_was_trained_is_told(content):
    first, second = content["points"][:2]
    points = [first | {"rung": "unchanged", "steps": 0}, second | {"rung": "full", "steps": 1716, "training_s": 674.0}]
    results = Results.read(content | {"points": points, "front": points})
    shown = rendered(front_table(results))
    assert "calibrated only" in shown and "1716 steps" in shown
    assert "alpha=" not in results.points[0].words, "nothing was distilled"
    assert "alpha=" in results.points[1].words
    assert frame(results)["steps"].tolist().count(1716) == 1


def test_names_are_printed_as_they_are(content):
    for name in ("[red]x[/red]", "[/x]", ":boat:", "layer[0]"):
        point = content["front"][0]
        layers = [layer | {"name": name} for layer in point["layers"][:1]]
        results = Results.read(content | {"front": [point | {"id": name, "layers": layers}]})
        assert name in rendered(front_table(results))
        assert name in rendered(layer_table(results.front[0]))


def test_the_summary_gives_intervals_and_the_original(results):
    text = summary(results)
    assert text.splitlines()[0] == headline(results)
    assert "95 % interval" in text
    assert "original 28.4 ms" in text
    assert f"{results.best_entry.val_score.n} validation examples" in text


def with_scores(content, val, test, n=5000):
    scores = {key: {"name": "accuracy", "value": value, "n": n} for key, value in (("val_score", val), ("test_score", test))}
    return content | {"baseline": content["baseline"] | scores}


def test_a_sound_search_has_no_caveats(content):
    sound = with_scores(content, 0.94, 0.935) | {"ladder": {"short_full_spearman": 0.9}}
    assert caveats(Results.read(sound)) == []
    assert "note:" not in summary(Results.read(sound))


def test_an_original_that_has_seen_the_validation_examples_is_told_of(content):
    assert "probably trained on the validation examples" in summary(Results.read(with_scores(content, 0.999, 0.934)))


@pytest.mark.parametrize(
    ("val", "test", "n"), [(0.934, 0.999, 5000), (0.96, 0.94, 100), (0.9995, 0.9955, 50_000)], ids=["worse", "few", "close"]
)
def test_a_difference_that_may_be_chance_or_is_small_is_not(content, val, test, n):
    assert caveats(Results.read(with_scores(content, val, test, n) | {"ladder": {}})) == []


def test_noise_and_a_ladder_that_lies_are_told_of(content):
    front = [content["front"][0] | {"latency_s": content["front"][0]["latency_s"] | {"noisy": True, "noise_reason": "drift"}}]
    told = caveats(Results.read(with_scores(content, 0.9, 0.9) | {"front": front, "ladder": {"short_full_spearman": -0.5, "full_runs": 5}}))
    assert len(told) == 2
    assert front[0]["id"] in told[0]
    assert "-0.50" in told[1]


def test_files_that_were_deleted_are_told_of_where_the_run_is_looked_at(content, tmp_path):
    sound = Results.read(with_scores(content, 0.94, 0.935) | {"ladder": {}})
    first, *rest = sound.front
    for entry in rest:
        (tmp_path / entry.artifact).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry.artifact).touch()
    (told,) = caveats(sound, tmp_path)
    assert first.id in told and "Resume" in told
    assert not any(entry.id in told for entry in rest)
    assert told in summary(sound, tmp_path).replace("\n", " ")


@pytest.mark.parametrize(("n", "budget", "told"), [(37, 0.1, True), (59, 0.1, False), (37, None, False)])
def test_a_tail_of_few_samples_is_told_of_where_the_budget_limits_it(content, n, budget, told):
    point = content["front"][0]
    front = [point | {"latency_s": point["latency_s"] | {"n": n, "p95_high": 2 * point["latency_s"]["median"]}}]
    results = Results.read(with_scores(content, 0.94, 0.935) | {"front": front, "ladder": {}, "budget": {"p95_s": budget}})
    assert any("95th percentile" in text for text in caveats(results)) is told
    assert ("at most" in latency_line(results.front[0].latency_s)) is (n >= 59)
    assert ("the longest took" in latency_line(results.front[0].latency_s)) is (n < 59)


@pytest.mark.parametrize(("rho", "told"), [(-0.2, True), (0.2, True), (0.6, False), (None, False)])
def test_appraisals_that_short_training_contradicts_are_told_of(content, rho, told):
    found = caveats(Results.read(with_scores(content, 0.9, 0.9) | {"ladder": {"appraised_short_spearman": rho}}))
    assert any("ranked unlike by short training" in text for text in found) is told


def test_the_frame_has_one_row_a_point(content):
    table = frame(Results.read(content))
    assert tuple(table.columns) == FRAME_COLUMNS
    assert len(table) == len(content["points"])
    assert table["latency_s"].is_monotonic_increasing
    assert table.loc[table["best"], "id"].tolist() == [content["best"]]
    by_id = {point["id"]: point for point in content["points"]}
    assert all(row.val_score == by_id[row.id]["val_score"]["value"] for row in table.itertuples())
    assert tuple(frame(Results.read(content | {"points": [], "front": []})).columns) == FRAME_COLUMNS


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dropped": True}, "removed with its block"),
        ({"channels": 8, "bits": 8}, "narrower, int8"),
        ({"channels": 32}, "wider"),
        ({"bits": 4}, "4-bit storage, computed in float32"),
        ({}, "unchanged"),
        ({"channels": 8, "teacher_latency_s": 1.0, "latency_s": 0.5}, "narrower"),
        (
            {"channels": 8, "teacher_latency_s": 1.0, "latency_s": 1.0},
            "narrower, not faster: the kernel takes as long for fewer channels here",
        ),
        ({"bits": 8, "teacher_latency_s": 1.0, "latency_s": 1.2}, "int8, not faster: int8 gains nothing at this shape"),
        ({"channels": 32, "teacher_latency_s": 1.0, "latency_s": 2.0}, "wider, not faster: more channels"),
    ],
)
def test_notes_say_what_changed_and_why_it_is_not_faster(changes, text):
    assert note(LayerChange(**{"name": "l", "teacher_channels": 16, "channels": 16} | changes)) == text


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (None, "-"),
        (Score(value=0.93391), "93.39 %"),
        (Score(name="top5", value=1.0), "100.00 %"),
        (Score(name="mIoU", value=0.51234), "0.5123"),
        (Score(name="loss", value=1.5, direction="minimize"), "1.5"),
    ],
)
def test_scores_as_people_write_them(score, text):
    assert format_score(score) == text


@settings(deadline=None)
@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_wilson_limits_are_the_shares_that_the_score_test_just_accepts(both):
    n, right = both
    share = right / n
    low, high = score_interval(Score(value=share, n=n))
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for limit in (low, high):
        if 1e-9 < limit < 1 - 1e-9:
            assert abs(share - limit) == pytest.approx(1.959964 * np.sqrt(limit * (1 - limit) / n), rel=1e-5)


def test_other_scores_have_no_interval():
    assert score_interval(Score(name="loss", value=0.5, n=9)) is None
    assert score_interval(Score(value=0.5)) is None


@settings(deadline=None)
@given(st.lists(st.floats(1e-7, 1e3), min_size=1, max_size=9))
@example([0.03])
def test_a_latency_axis_holds_all_values_and_a_few_round_ticks(values):
    axis = Axis.of(values)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert axis.low < axis.high
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 16
    assert len(axis.texts) == len(axis.ticks)
    assert axis.log == (max(values) > 4 * min(values))


@settings(deadline=None)
@given(st.floats(0, 10**6))
def test_time_ticks_are_few_and_within(high):
    ticks = time_ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] <= high
    assert len(ticks) <= 13
    assert len({round(b - a, 6) for a, b in itertools.pairwise(ticks)}) <= 1


def test_where_most_policies_failed_the_first_reason_is_told(content):
    failures = [{"id": f"0000{n}", "stage": "train", "reason": f"the loss is not finite at step {n}"} for n in range(2)]
    unchanged = [entry | {"rung": "unchanged", "steps": 0} for entry in content["points"][:2]]
    (told,) = caveats(Results.read(with_scores(content, 0.94, 0.935) | {"ladder": {}, "failures": failures, "points": unchanged}))
    assert "2 policies failed, the first at its train stage: the loss is not finite at step 0" in told and "failures.log" in told
