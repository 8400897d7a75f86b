"""Ctrl-C and the signals that end a search, heard even where Python swallows what their handlers raise.

An exception that is raised while a weak reference's callback or a destructor runs is printed and forgotten: a database that is busy has
many of these, so that one Ctrl-C in ten was lost. What was raised in vain is not printed, and raised again as soon as the search tells of
its progress.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self, final

from autocompress.errors import Terminated
from autocompress.system.progress import Progress, Status


class _Signalled(BaseException):
    """Not an Exception, as KeyboardInterrupt is none: what handles errors of one policy must not stop it."""


class Stop:
    """What a signal has asked for."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """As a signal handler: KeyboardInterrupt for Ctrl-C."""
        self._error = KeyboardInterrupt() if number == signal.SIGINT else _Signalled(signal.Signals(number).name)
        raise self._error

    def is_told_by(self, swallowed: sys.UnraisableHookArgs) -> bool:
        """Whether what Python could not raise is what a signal has asked for."""
        return self._error is not None and swallowed.exc_value is self._error

    def raise_again(self) -> None:
        """What was raised in vain."""
        if self._error is not None:
            raise self._error


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGTERM and SIGHUP end a search as Ctrl-C does: what is finished is written, and then Terminated is raised.

    A signal that was ignored before stays so, as under nohup, and so does a handler for Ctrl-C that is not Python's own.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    heard += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    before = {number: signal.signal(number, stop.handle) for number in heard}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda swallowed: None if stop.is_told_by(swallowed) else hook(swallowed)
    try:
        yield stop
    except _Signalled as signalled:
        raise Terminated(f"the search was terminated by {signalled}", hint="what is finished is kept: resume it") from None
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@final
class Attentive:
    """A progress that raises what a signal has raised in vain."""

    def __init__(self, progress: Progress, stop: Stop) -> None:
        self._progress, self._stop = progress, stop

    def update(self, status: Status) -> None:
        """The state now; raises what ends the search."""
        self._stop.raise_again()
        self._progress.update(status)

    def message(self, text: str) -> None:
        """One line that stays."""
        self._progress.message(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Who made the progress that is inside ends it."""
