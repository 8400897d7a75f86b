"""How a running search shows itself: live on a terminal, plain lines elsewhere, or not at all. All on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO, final

from autocompress.units import format_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_INTERVAL_S = 5.0
BAR_WIDTH = 24


PhaseTick = Callable[[str, int, int], None]
"""Called with a phase, and how much of it is done out of how much."""


@dataclass(frozen=True)
class Status:
    """Where a search is.

    Args:
        done, total: progress within the phase; total is None when it has no known end.
        tried: how many policies were tried so far, failed ones included.
        best: the best policy within the budget so far, in words; empty while there is none.
        seconds_left: until the search ends; None when unknown.
    """

    phase: str
    done: int = 0
    total: int | None = None
    tried: int = 0
    best: str = ""
    seconds_left: float | None = None


class Progress(Protocol):
    """What a search reports to while it runs. Used as a context manager; calls come from one thread."""

    def update(self, status: Status) -> None:
        """Where it is now."""

    def message(self, text: str) -> None:
        """One line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def counting(progress: Progress) -> PhaseTick:
    """Shows how far a phase is that comes before any policy."""

    def tick(phase: str, done: int, total: int) -> None:
        progress.update(Status(phase, done, total))

    return tick


@final
class SilentProgress:
    """Shows nothing."""

    def update(self, status: Status) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to end."""


@final
class PlainProgress:
    """Lines for logs and pipes: one a phase, then at most one every `interval_s` seconds.

    Phases that differ only after a comma ("short training, policy 7") count as one.
    """

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._phase = ""
        self._next = 0.0

    def update(self, status: Status) -> None:
        now, kind = time.monotonic(), status.phase.partition(",")[0]
        if kind == self._phase and now < self._next:
            return
        self._phase, self._next = kind, now + self._interval_s
        parts = [status.phase + _fraction(status.done, status.total)]
        parts += [f"{status.tried} tried"] if status.tried else []
        parts += [f"best so far {status.best}"] if status.best else []
        parts += [f"{_remaining(status.seconds_left)} left"] if status.seconds_left is not None else []
        self._write("; ".join(parts))

    def message(self, text: str) -> None:
        self._write(text)

    def _write(self, line: str) -> None:
        # A log that can no longer be written is no reason to lose a search.
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._next = float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to end."""


@final
class RichProgress:
    """Two lines that stay in place on a terminal: phase with a bar; best so far, time spent and left."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console or Console(stderr=True, highlight=False)
        self._spinner = Spinner("dots", style="cyan")
        self._started = time.monotonic()
        self._status = Status("starting")
        self._ends: float | None = None
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=8, transient=True)  # renders at once

    def update(self, status: Status) -> None:
        self._status = status
        self._ends = None if status.seconds_left is None else time.monotonic() + status.seconds_left

    def message(self, text: str) -> None:
        from rich.text import Text

        with suppress(OSError):  # the terminal is gone
            self._console.print(Text(text))

    def render(self) -> RenderableType:
        """What is on the screen now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        first, now = Table.grid(padding=(0, 1)), self._status
        bar = ProgressBar(total=now.total, completed=now.done, width=BAR_WIDTH) if now.total else Text("")
        count = _fraction(now.done, now.total).strip()
        first.add_row(self._spinner, Text(now.phase, style="bold"), bar, Text(count, style="dim"))
        parts = [f"{now.tried} tried"] if now.tried else []
        parts.append(f"{format_duration(max(1.0, time.monotonic() - self._started))} elapsed")
        if self._ends is not None:
            parts.append(f"{_remaining(self._ends - time.monotonic())} left")
        second = Text("  ")
        second.append(f"best so far {now.best}" if now.best else "nothing to ship yet", style="green")
        second.append("   " + ", ".join(parts), style="dim")
        return Group(first, second)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        with suppress(OSError):
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            self._live.stop()


def make_progress(quiet: bool = False) -> Progress:
    """What suits stderr: live on a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet:
        return SilentProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


def _fraction(done: int, total: int | None) -> str:
    if total is None:
        return f" {done}" if done else ""
    return f" {done} %" if total == 100 else f" {done}/{total}"


def _remaining(seconds: float) -> str:
    return format_duration(round(seconds)) if seconds >= 1 else "0 s"
