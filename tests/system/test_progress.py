from __future__ import annotations

import errno
import io
import time

import pytest
from rich.console import Console

from autocompress.system.progress import PlainProgress, RichProgress, SilentProgress, Status, make_progress


def update(progress, phase="short training", done=1, **status):
    progress.update(Status(phase, done, **status))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_at_a_new_phase_and_then_every_interval(clock):
    stream = io.StringIO()
    with PlainProgress(stream, interval_s=5) as progress:
        for second in range(12):
            clock[0] = 100.0 + second
            update(progress, phase=f"short training, policy {second}", done=second, total=40)
        update(progress, phase="full training")
    assert stream.getvalue().splitlines() == [
        "short training, policy 0 0/40",
        "short training, policy 5 5/40",
        "short training, policy 10 10/40",
        "full training 1",
    ]


def test_a_plain_line_says_how_many_were_tried_the_best_and_time_left():
    stream = io.StringIO()
    update(PlainProgress(stream), done=7, total=100, tried=4, best="93 % at 9 ms", seconds_left=125.4)
    assert stream.getvalue() == "short training 7 %; 4 tried; best so far 93 % at 9 ms; 2m 05s left\n"


@pytest.mark.parametrize("seconds", [0.0, -3.0, 0.4])
def test_time_left_is_never_negative(seconds):
    stream = io.StringIO()
    update(PlainProgress(stream), seconds_left=seconds)
    assert stream.getvalue().endswith("; 0 s left\n")


def test_messages_always_come():
    stream = io.StringIO()
    progress = PlainProgress(stream)
    for number in range(3):
        progress.message(f"line {number}")
    assert stream.getvalue() == "line 0\nline 1\nline 2\n"


def test_a_log_that_is_gone_does_not_end_a_search():
    stream = io.StringIO()
    progress = PlainProgress(stream)
    stream.close()
    progress.message("lost")
    update(progress)


def test_silence(capsys):
    with SilentProgress() as progress:
        update(progress)
        progress.message("nothing")
    assert capsys.readouterr() == ("", "")


def test_the_live_display_prints_names_as_they_are():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with RichProgress(console) as progress:
        update(progress, phase="full [x]", done=3, total=9, tried=5, best="93 % at 9 ms", seconds_left=60)
        update(progress, phase="full [x]", done=4, total=9, tried=6, best="93 % at 9 ms", seconds_left=60)
        progress.message("policy [/red] failed")
        shown = Console(width=100, file=io.StringIO(), color_system=None)
        shown.print(progress.render())
    text = shown.file.getvalue()
    assert "full [x]" in text and "4/9" in text and "best so far 93 % at 9 ms" in text and " left" in text and "6 tried" in text
    assert "policy [/red] failed" in console.file.getvalue()


@pytest.mark.parametrize(("quiet", "terminal"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_suits_stderr(monkeypatch, quiet, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    expected = SilentProgress if quiet else RichProgress if terminal else PlainProgress
    assert isinstance(make_progress(quiet), expected)


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_or_terminal_that_cannot_be_written_does_not_end_a_search():
    plain = PlainProgress(FullDisk())
    plain.message("one")
    plain.update(Status("a"))
    with RichProgress(Console(file=FullDisk(), force_terminal=True)) as live:
        live.message("one")
