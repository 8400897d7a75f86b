"""The ledger charges every second once, to the innermost kind of work."""

from __future__ import annotations

import time

import pytest

from autocompress.setup.ledger import Ledger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_work_inside_other_work_counts_once(clock: list[float]) -> None:
    ledger = Ledger()
    with ledger.spend("train"):
        clock[0] += 1
        with ledger.spend("reconstruct"):
            clock[0] += 2
        clock[0] += 4
    assert ledger.spent() == {"train": 5, "reconstruct": 2}


def test_what_happens_between_is_nobodys(clock: list[float]) -> None:
    ledger = Ledger()
    with ledger.spend("measure"):
        clock[0] += 1
    clock[0] += 10
    with ledger.spend("measure"):
        clock[0] += 1
    assert ledger.spent() == {"measure": 2}


def test_time_is_charged_when_the_work_fails(clock: list[float]) -> None:
    ledger = Ledger()
    with pytest.raises(KeyboardInterrupt), ledger.spend("train"), ledger.spend("reconstruct"):
        clock[0] += 3
        raise KeyboardInterrupt
    clock[0] += 5
    assert ledger.spent() == {"train": 0, "reconstruct": 3}


def test_a_resumed_ledger_goes_on_and_shows_what_is_open(clock: list[float]) -> None:
    ledger = Ledger({"train": 7.0})
    with ledger.spend("train"):
        clock[0] += 1
        assert ledger.spent() == {"train": 8}
