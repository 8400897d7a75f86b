"""Axes that people can read: limits with some air, ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autocompress.units import format_duration

LOG_FROM = 4.0
"""Latencies that spread over more than this ratio are shown on a logarithmic axis."""


@dataclass(frozen=True)
class Axis:
    """A latency axis: limits in seconds, tick positions in seconds with their texts."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        """The axis that holds all `values` (> 0) with some air."""
        low, high = min(values), max(values)
        log = high > LOG_FROM * low
        if log:
            air = (high / low) ** 0.06
            low, high = low / air, high * air
        else:
            air = 0.08 * (high - low) or 0.2 * high
            low, high = max(0.0, low - air), high + air
        return cls(low, high, log, tuple(_log_ticks(low, high) if log else _linear_ticks(low, high)))

    @property
    def texts(self) -> list[str]:
        return [format_duration(tick) if tick else "0" for tick in self.ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ratio = high / low
    steps = (1,) if ratio > 300 else (1, 2, 5) if ratio > 30 else (1, 2, 3, 5)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    ticks = [index * step for index in range(first, math.floor(high / step) + 1)]
    return [tick for tick in ticks if low <= tick <= high]  # a product of floats may lie beyond


def time_ticks(high: float) -> list[float]:
    """Round times (s) from 0 to `high`, at most seven."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
    step = next((step for step in steps if high / step <= 6), 86400)
    return [float(index * step) for index in range(int(high / step) + 1)]
