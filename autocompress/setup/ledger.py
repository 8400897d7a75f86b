"""Where the time of a search goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Work = Literal["prepare", "calibrate", "teach", "appraise", "reconstruct", "train", "export", "score", "measure"]
"""Model and data loaded, traced and checked, the original exported and measured; operators measured ahead; the teacher's answers;
untrained students made and compared; students reconstructed, and trained, before they are exported; files written; files run on examples,
and compared with their students; files timed, with the pauses that a restless machine asks for. What is none of it is the search itself:
drawing, predicting, suggesting, deciding."""


class Ledger:
    """Seconds by kind of work. Work inside other work counts once, as its own kind."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self._spent: dict[str, float] = dict(spent or {})
        self._open: list[Work] = []
        self._since = 0.0

    @contextmanager
    def spend(self, work: Work) -> Iterator[None]:
        """Charge what happens inside to this kind of work."""
        self._charge()
        self._open.append(work)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def spent(self) -> dict[str, float]:
        """Seconds by kind, by now."""
        self._charge()
        return dict(self._spent)

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            self._spent[self._open[-1]] = self._spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now
