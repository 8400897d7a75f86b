"""front.json as it is written and read."""

from __future__ import annotations

import json

import pytest

from autocompress.errors import RunFolderError, UsageError
from autocompress.records import Outcome
from autocompress.results import Entry, Results


def without_best(content):
    """Every point over the budget."""
    points = [point | {"feasible": False} for point in content["points"]]
    return Results.read(content | {"front": [], "points": points, "best": None})


def test_what_is_written_is_what_is_read(results):
    written = json.loads(results.to_json())
    assert written["schema"] == 1
    assert written["points"][0]["words"] == results.points[0].policy.in_words()
    assert Results.read(written) == results


def test_an_entry_says_all_that_is_known_of_a_measured_policy():
    assert Outcome.model_fields.keys() - Entry.model_fields.keys() == {"failure"}


def test_pick_by_id_by_digest_and_best(results):
    best = results.best_entry
    assert results.pick("best") is results.pick(best.id) is results.pick(best.digest) is results.pick(best.digest[:6]) is best
    for name in ("00004-fulll", best.digest[:5], "", "../x"):
        with pytest.raises(UsageError, match="no measured policy"):
            results.pick(name)


def test_pick_without_a_best(content):
    with pytest.raises(UsageError, match="within the budget"):
        without_best(content).pick("best")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"baseline": None}, "baseline"),
        ({"points": [{}]}, "points.0"),
        ({"front": 3}, "front"),
        ({"budget": {"latency_s": -1}}, "budget.latency_s"),
        ({"elapsed_s": "long"}, "elapsed_s"),
    ],
)
def test_damaged_content_is_refused_by_field(content, change, named):
    with pytest.raises(RunFolderError, match=named):
        Results.read(content | change)


def test_keys_of_a_later_version_are_skipped(content):
    assert Results.read(content | {"invented_later": 1}) == Results.read(content)
