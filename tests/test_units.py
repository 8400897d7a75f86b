from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.units import format_count, format_duration, format_size, is_size, parse_duration, parse_latency, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10ms", 0.01),
        ("500us", 5e-4),
        ("500 µs", 5e-4),
        ("3ns", 3e-9),
        ("1.5s", 1.5),
        (".5 m", 30),
        ("2min", 120),
        ("1h", 3600),
        ("1e-3s", 1e-3),
        ("+7ms", 7e-3),
    ],
)
def test_durations_are_seconds(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4MB", 4_000_000), ("1KiB", 1024), ("1.5 kB", 1500), ("16.1kB", 16_100), ("2GiB", 2**31), ("0.2B", 1), ("1TB", 10**12)],
)
def test_sizes_are_whole_bytes(text, n_bytes):
    assert parse_size(text) == n_bytes
    assert is_size(text)


@pytest.mark.parametrize(
    "text", ["", "ms", "10", "abc", "1,5ms", "10 m s", "0ms", "-1ms", "nan", "nanms", "infs", "1e400s", "10MB", "10MS"]
)
def test_what_is_no_duration_is_refused_with_a_cure(text):
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert "30m" in caught.value.hint


def test_a_latency_is_no_minutes():
    assert parse_latency("10ms") == pytest.approx(0.01)
    for text in ("10m", "1min", "1h"):
        with pytest.raises(UsageError, match="unknown unit") as caught:
            parse_latency(text)
        assert "10ms" in caught.value.hint


@pytest.mark.parametrize("text", ["4", "-4MB", "0B", "4mb", "4Mb", "1e400GB", "10ms"])
def test_what_is_no_size_is_refused_with_a_cure(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert "4MB" in caught.value.hint


@settings(deadline=None)
@given(st.floats(1e-9, 59.9))
def test_a_printed_duration_reads_back_to_three_digits(seconds):
    text = format_duration(seconds)
    assert "e" not in text
    assert parse_duration(text) == pytest.approx(seconds, rel=5.1e-3)


@settings(deadline=None)
@given(st.integers(1, 10**14))
def test_a_printed_size_reads_back_to_three_digits(n_bytes):
    text = format_size(n_bytes)
    assert "e" not in text
    assert parse_size(text) == pytest.approx(n_bytes, rel=5.1e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00987, "9.87 ms"),
        (0.9999, "1 s"),
        (9.9996e-4, "1 ms"),
        (0.0, "0 ns"),
        (60, "1m 00s"),
        (119.7, "2m 00s"),
        (125, "2m 05s"),
        (3600, "1h 00m"),
        (7260, "2h 01m"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_durations_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (999_999, "1 MB"), (1_234_567, "1.23 MB"), (2.5e12, "2.5 TB")])
def test_sizes_as_people_write_them(n_bytes, text):
    assert format_size(n_bytes) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (950, "950"), (36_992, "37 k"), (999_960, "1 M"), (118_013_952, "118 M")])
def test_counts_as_people_write_them(number, text):
    assert format_count(number) == text
