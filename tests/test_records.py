from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from autocompress.budget import Budget
from autocompress.errors import UsageError
from autocompress.policy import Policy
from autocompress.records import Failure, Measurement, Outcome, Prediction, Score
from autocompress.workload import Operator, Workload

LATENCY = Measurement(median=0.008, low=0.0079, high=0.009, p95=0.012, n=100)
CONV = Operator(name="c", kind="conv", inputs=((2, 6, 8, 8),), output=(2, 4, 4, 4), kernel=(3, 3), stride=(2, 2), groups=2, params=112)
LINEAR = Operator(name="l", kind="linear", inputs=((2, 64),), output=(2, 10), params=650)
RECORDS = [
    LATENCY,
    CONV,
    Workload(operators=(CONV, LINEAR), weight_bytes=1000),
    Prediction(value=0.1, low=0.05, high=0.2),
    Score(value=0.5, direction="minimize", n=7),
    Budget(latency_s=0.01, size_bytes=5),
    Outcome(id="0", policy=Policy(), rung="full", val_score=Score(value=0.5), latency_s=LATENCY, artifact="a.onnx"),
    Outcome(id="1", policy=Policy(), rung="short", failure=Failure(stage="train", reason="diverged")),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_round_trip_and_unknown_key(record):
    assert type(record).from_json(record.to_json()) == record
    with pytest.raises(UsageError, match="surprise"):
        type(record).from_json(record.to_json().replace("{", '{"surprise": 1,', 1))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("10ms", {"latency_s": 0.01}),
        (" 500 us ", {"latency_s": 5e-4}),
        ("0.5x", {"relative": 0.5}),
        ("2x", {"relative": 2.0}),
        ("4MB", {"size_bytes": 4_000_000}),
        ("p95=10ms", {"p95_s": 0.01}),
        ("10ms, 4MB,p95=12ms", {"latency_s": 0.01, "size_bytes": 4_000_000, "p95_s": 0.012}),
        (["10ms", "0.5x"], {"latency_s": 0.01, "relative": 0.5}),
        (("1s", "1KiB"), {"latency_s": 1.0, "size_bytes": 1024}),
    ],
)
def test_budgets(text, limits):
    assert Budget.parse(text) == Budget(**limits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "0",
        "0ms",
        "-1ms",
        "nan",
        "nanx",
        "infx",
        "abc",
        "x",
        "0x",
        "-1x",
        "10ms,",
        "p95=",
        "p95=10",
        "p95=0.5x",
        "10 ms 4MB",
        "-4MB",
        "0B",
        "10ms,11ms",
        "4MB,5kB",
        "0.5x,0.6x",
        "p95=1ms,p95=2ms",
        "10kb",
    ],
)
def test_what_is_no_budget_is_refused_with_a_cure(text):
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert caught.value.hint


def test_violation_is_the_largest_relative_excess():
    budget = Budget(latency_s=0.01, size_bytes=100, p95_s=0.02)
    assert budget.violation(0.005, 50, 0.01) == pytest.approx(-0.5)
    assert budget.violation(0.005, 150, 0.01) == pytest.approx(0.5)
    assert budget.violation(0.02, 150, 0.08) == pytest.approx(3.0)
    assert budget.violation(0.01, 100, 0.02) == 0.0
    assert budget.violation(0.005, 50) == pytest.approx(-0.5)
    assert Budget().violation(1e9, 10**15, 1e9) < 0


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [("9ms", True), ("8.5ms", False), ("p95=12ms", True), ("p95=11ms", False), ("10B", True), ("9B", False), ("9ms,9B", False)],
)
def test_a_budget_bounds_the_upper_end_of_the_interval(budget, allowed):
    assert Budget.parse(budget).allows(LATENCY, 10) is allowed


@pytest.mark.parametrize(("text", "seconds"), [("0.5x", 0.004), ("0.5x,10ms", 0.004), ("0.5x,1ms", 0.001), ("10ms", 0.01)])
def test_relative_budgets_become_seconds_of_the_baseline(text, seconds):
    budget = Budget.parse(text).against(LATENCY.median)
    assert budget.latency_s == pytest.approx(seconds)
    assert budget.relative is None


def test_budgets_in_words():
    assert Budget().in_words() == "none"
    assert Budget.parse("10ms,p95=12ms,4MB").in_words() == "latency 10 ms, p95 12 ms, size 4 MB"
    assert Budget.parse("0.5x").in_words() == "latency 0.5x of the baseline"


def test_multiply_accumulates_by_hand():
    assert CONV.macs == 2 * 4 * 4 * 4 * (6 // 2) * 9
    assert LINEAR.macs == 2 * 10 * 64
    workload = Workload(operators=(CONV, LINEAR), weight_bytes=0)
    assert (workload.macs, workload.params) == (CONV.macs + LINEAR.macs, 762)


def test_a_signature_ignores_the_name_only():
    assert CONV.model_copy(update={"name": "other"}).signature == CONV.signature
    assert CONV.model_copy(update={"bits": 8}).signature != CONV.signature


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_never_enter_a_record(value):
    with pytest.raises(ValidationError):
        Score(value=value)
    with pytest.raises(ValidationError):
        Measurement(median=1.0, low=1.0, high=value, p95=1.0, n=1)


def test_gain_is_larger_for_the_better():
    assert Score(value=0.9).gain > Score(value=0.8).gain
    assert Score(value=0.8, direction="minimize").gain > Score(value=0.9, direction="minimize").gain
