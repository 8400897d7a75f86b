"""Signals end a search, however they arrive."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from autocompress.errors import Terminated
from autocompress.system.progress import SilentProgress, Status
from autocompress.system.signals import Attentive, stopped_by_signals

NOW = Status("training", 1)


@pytest.fixture
def handlers():
    """The handlers of this process, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_search(handlers, number):
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(Terminated, match=number.name), stopped_by_signals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_already_stays_ignored(handlers, number):
    """`nohup autocompress search` goes on when its terminal is closed."""
    signal.signal(number, signal.SIG_IGN)
    with stopped_by_signals():
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN


class Dying:
    """Does something where Python forgets what is raised."""

    def __init__(self, last, *args):
        self.last, self.args = last, args

    def __del__(self):
        self.last(*self.args)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_what_python_has_swallowed_is_raised_again(handlers, monkeypatch, number, error):
    """Seen in searches: the callbacks of weak references, of which a database has many, swallowed one Ctrl-C in ten, and printed it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    swallowed, reached = [], []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)
    with pytest.raises(error), stopped_by_signals() as stop:
        progress = Attentive(SilentProgress(), stop)
        progress.update(NOW)
        Dying(signal.raise_signal, number)
        reached.append("on")
        progress.update(NOW)
    assert (swallowed, reached) == ([], ["on"])


def test_what_python_swallows_else_is_still_printed(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda swallowed: told.append(swallowed.exc_value))
    with stopped_by_signals():
        Dying(int, "no number")
    assert [type(error) for error in told] == [ValueError]


def test_a_second_ctrl_c_ends_what_follows_the_first(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started, cleaned = time.monotonic(), []
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9.0)
        finally:
            cleaned.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9.0)
    assert cleaned == [True]
    assert time.monotonic() - started < 5.0
