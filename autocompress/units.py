"""Parse and print quantities. Inside autocompress everything is seconds and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from autocompress.errors import UsageError

_LATENCY_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION_S = _LATENCY_S | {"m": 60.0, "min": 60.0, "h": 3600.0}
_SIZE_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ]*)\s*")


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    hint = f"write a number and a unit, for example {example} (units: {', '.join(units)})"
    if match is None:
        raise UsageError(f"a {what} is a number with a unit, but got {text!r}", hint=hint)
    number, unit = float(match[1]), match[2]
    if not unit:
        raise UsageError(f"a {what} needs a unit, but got {text!r}", hint=hint)
    if unit not in units:
        raise UsageError(f"unknown unit {unit!r} in the {what} {text!r}", hint=hint)
    value = number * units[unit]
    if not (math.isfinite(value) and value > 0):
        rule = "greater than zero" if math.isfinite(value) else "finite"
        raise UsageError(f"a {what} must be {rule}, but got {text!r}", hint=hint)
    return value


def parse_duration(text: str) -> float:
    """`"30m"` -> 1800.0 seconds. Raises UsageError unless positive, finite and with a unit."""
    return _parse(text, _DURATION_S, "duration", "30m")


def parse_latency(text: str) -> float:
    """The same of one call of a model, which takes no minutes: `"10m"` is `"10ms"` mistyped, and would allow everything."""
    return _parse(text, _LATENCY_S, "latency", "10ms")


def parse_size(text: str) -> int:
    """`"4MB"` -> 4000000 bytes. Raises UsageError unless positive, finite and with a unit."""
    return max(1, round(_parse(text, _SIZE_BYTES, "size", "4MB")))


def is_size(text: str) -> bool:
    """Whether the text ends in a unit of size."""
    match = _QUANTITY.fullmatch(text)
    return match is not None and match[2] in _SIZE_BYTES


def format_duration(seconds: float) -> str:
    """0.00987 -> `"9.87 ms"`; from a minute on `"2m 05s"`."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
    return _three_digits(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def format_size(n_bytes: float) -> str:
    """1234567 -> `"1.23 MB"`."""
    return _three_digits(n_bytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def format_count(number: float) -> str:
    """36992 -> `"37 k"`."""
    return _three_digits(number, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))).rstrip()


def _three_digits(value: float, scale: tuple[tuple[float, str], ...]) -> str:
    """In the largest unit of which it is one or more after rounding, else in the last: 0.9999 s is 1 s, not 1e+03 ms."""
    factor, unit = next((step for step in scale if float(f"{value / step[0]:.3g}") >= 1), scale[-1])
    return f"{value / factor:.3g} {unit}"


def counted(n: int, what: str, several: str = "") -> str:
    """`"1 layer"`, `"2 layers"`; `several` where an s does not make the plural."""
    return f"{n} {what}" if n == 1 else f"{n} {several or what + 's'}"


def finite(value: Any) -> Any:
    """The value with NaN and infinity as null, which JSON can say; keys are text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
