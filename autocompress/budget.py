"""Limits on the product, as a user gives them and as they are held against what was measured."""

from __future__ import annotations

import math

from pydantic import Field

from autocompress.errors import UsageError
from autocompress.record import Record
from autocompress.records import Measurement
from autocompress.units import format_duration, format_size, is_size, parse_latency, parse_size


def _budget_duration(text: str) -> float:
    try:
        return parse_latency(text)
    except UsageError as error:
        raise UsageError(
            error.message.replace("latency", "budget"), hint="write 10ms, 500us, 0.5x (of the baseline), 4MB or p95=10ms"
        ) from None


class Budget(Record):
    """Limits on the product. `latency_s` bounds the upper end of the median's 95 % interval, `p95_s` that of the 95th percentile's.

    `relative` bounds latency as a fraction of the original's: of what it took beside a measurement, or `against` what is known of it.
    """

    latency_s: float | None = Field(None, gt=0)
    p95_s: float | None = Field(None, gt=0)
    size_bytes: int | None = Field(None, gt=0)
    relative: float | None = Field(None, gt=0)

    @classmethod
    def parse(cls, texts: str | tuple[str, ...] | list[str]) -> Budget:
        """`"10ms"`, `"0.5x"`, `"4MB"`, `"p95=10ms"`, several at once (a list, or separated by commas)."""
        parts = [part.strip() for text in ([texts] if isinstance(texts, str) else texts) for part in text.split(",")]
        limits: dict[str, float] = {}
        for part in parts:
            key, value = cls._parse_one(part)
            if key in limits:
                what = {"latency_s": "latency", "p95_s": "p95", "size_bytes": "size", "relative": "relative latency"}[key]
                raise UsageError(f"the budget limits {what} twice: {', '.join(parts)}", hint="give each limit once")
            limits[key] = value
        return cls.model_validate(limits)

    @staticmethod
    def _parse_one(part: str) -> tuple[str, float]:
        if part.startswith("p95="):
            return "p95_s", _budget_duration(part.removeprefix("p95="))
        if is_size(part):
            return "size_bytes", parse_size(part)
        if part.endswith("x"):
            try:
                factor = float(part[:-1])
            except ValueError:
                factor = math.nan
            if not (math.isfinite(factor) and factor > 0):
                raise UsageError(
                    f"a relative budget must be a number greater than zero and x, but got {part!r}",
                    hint="0.5x means half of the measured baseline",
                )
            return "relative", factor
        return "latency_s", _budget_duration(part)

    def against(self, original_s: float) -> Budget:
        """The same budget with `relative` turned into seconds, for an original of this latency."""
        if self.relative is None:
            return self
        limit = self.relative * original_s
        return self.model_copy(update={"relative": None, "latency_s": min(limit, self.latency_s or limit)})

    def violation(self, latency_s: float, size_bytes: float, p95_s: float | None = None) -> float:
        """Largest relative excess over a limit; <= 0 means within the budget."""
        pairs = [(latency_s, self.latency_s), (size_bytes, self.size_bytes), (p95_s, self.p95_s)]
        return max((value / limit - 1.0 for value, limit in pairs if limit is not None and value is not None), default=-1.0)

    def allows(self, measurement: Measurement, size_bytes: float, *, margin: float = 0.0) -> bool:
        """Whether a measured artifact is within the budget, and would be if it were slower by `margin`."""
        if self.relative is not None:
            assert measurement.original_s is not None, "a relative budget needs the original beside each measurement"
            return self.against(measurement.original_s).allows(measurement, size_bytes, margin=margin)
        return self.violation((1 + margin) * measurement.high, size_bytes, (1 + margin) * measurement.tail) <= 0

    def leaves_open(self, measurement: Measurement, size_bytes: float) -> bool:
        """Whether a measured artifact is over the budget by the width of its intervals alone."""
        certain = measurement.model_copy(update={"high": measurement.median, "p95_high": measurement.p95})
        return not self.allows(measurement, size_bytes) and self.allows(certain, size_bytes)

    def times(self, factor: float) -> Budget:
        """All limits so many times as wide."""
        limits = {name: factor * value for name, value in self.model_dump().items() if value is not None}
        return Budget.model_validate(limits | ({"size_bytes": int(limits["size_bytes"])} if "size_bytes" in limits else {}))

    @property
    def of_time(self) -> Budget:
        """Its limits on latency alone."""
        return self.model_copy(update={"size_bytes": None})

    @property
    def of_size(self) -> Budget:
        """Its limit on size alone."""
        return Budget(size_bytes=self.size_bytes)

    def in_words(self) -> str:
        limits = []
        if self.latency_s is not None:
            limits.append(f"latency {format_duration(self.latency_s)}")
        if self.p95_s is not None:
            limits.append(f"p95 {format_duration(self.p95_s)}")
        if self.size_bytes is not None:
            limits.append(f"size {format_size(self.size_bytes)}")
        if self.relative is not None:
            limits.append(f"latency {self.relative:g}x of the baseline")
        return ", ".join(limits) or "none"
