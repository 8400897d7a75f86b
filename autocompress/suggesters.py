"""What stands in for `optuna.Trial` when a policy is drawn: each suggester chooses a value for every dimension that it is asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from autocompress.policy import DistillSpec

USUAL: dict[str, Any] = {f"distill:{name}": value for name, value in DistillSpec().model_dump().items()}
"""Dimensions that do not change a student but how it is trained, at the values that are usually best."""
SCATTER = 0.2
VARIED = 1.5
"""Dimensions that a variation changes, on average."""
MOST_VALUES = 9
"""Of a dimension with more values so many, evenly spaced, are recorded."""


class Suggester(Protocol):
    """What `optuna.Trial` and `optuna.trial.FixedTrial` offer."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Dimension:
    """What a space asks for: one of some choices, or a number between two ends.

    Args:
        choices: None for a number.
        step: distance of the values from the lower end on; None where all between the ends are meant.
        log: spaced by ratio; the step then is of no account.
        whole: an integer.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    @property
    def steps(self) -> int | None:
        """From the first value to the last; None where there is no grid."""
        if self.choices is not None:
            return len(self.choices) - 1
        return None if self.log or self.step is None else math.floor((self.high - self.low) / self.step + 1e-9)

    def at(self, quantile: float) -> Any:
        """The value below which so many are, from 0 to 1."""
        if self.steps is not None:
            return self._on_grid(min(self.steps, math.floor(quantile * (self.steps + 1))))
        return self._between(self.low * (self.high / self.low) ** quantile if self.log else self.low + quantile * (self.high - self.low))

    def nearest(self, value: Any) -> Any:
        """The value that is nearest to another one; of choices that are no numbers the first, unless it is one of them."""
        if self.choices is not None:
            if value in self.choices or not all(isinstance(choice, (int, float)) for choice in self.choices):
                return value if value in self.choices else self.choices[0]
            return min(self.choices, key=lambda choice: abs(choice - value))
        if self.steps is None or self.step is None:
            return self._between(value)
        return self._on_grid(min(self.steps, round((min(self.high, max(self.low, value)) - self.low) / self.step)))

    def holds(self, value: Any) -> bool:
        """Whether it is one of the choices, or lies between the ends."""
        return value in self.choices if self.choices is not None else self.low <= value <= self.high

    def values(self) -> tuple[Any, ...]:
        """All choices; of numbers up to MOST_VALUES, evenly spaced, in order."""
        if self.choices is not None:
            return self.choices
        if self.steps is not None:
            indices = np.unique(np.rint(np.linspace(0, self.steps, min(self.steps + 1, MOST_VALUES))))
            return tuple(self._on_grid(int(index)) for index in indices)
        spaced = np.geomspace(self.low, self.high, MOST_VALUES) if self.log else np.linspace(self.low, self.high, MOST_VALUES)
        return tuple(sorted({self._between(float(value)) for value in spaced}))

    def asked_of(self, other: Suggester) -> Any:
        """What another suggester chooses."""
        if self.choices is not None:
            return other.suggest_categorical(self.name, list(self.choices))
        if self.whole:
            return other.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return other.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def _on_grid(self, index: int) -> Any:
        if self.choices is not None:
            return self.choices[index]
        assert self.step is not None
        value = min(self.high, self.low + self.step * index)
        return int(value) if self.whole else float(value)

    def _between(self, value: float) -> float:
        value = min(self.high, max(self.low, value))
        return round(value) if self.whole else float(value)


class DimensionSuggester(ABC):
    """A Suggester that chooses by the whole of a dimension."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self.choose(Dimension(name, low=low, high=high, step=step, log=log, whole=True)))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        return float(self.choose(Dimension(name, low=low, high=high, step=step, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.choose(Dimension(name, choices=tuple(choices)))

    @abstractmethod
    def choose(self, dimension: Dimension) -> Any:
        """A value of the dimension."""


@dataclass
class LevelSuggester(DimensionSuggester):
    """Draws around one level for each kind of dimension (width, depth, prune, bits), and remembers what it drew."""

    generator: np.random.Generator
    params: dict[str, Any] = field(default_factory=dict)
    _levels: dict[str, float] = field(default_factory=dict)

    def choose(self, dimension: Dimension) -> Any:
        kind = dimension.name.partition(":")[0]
        level = self._levels.setdefault(kind, float(self.generator.random()))
        value = dimension.at(float(np.clip(level + SCATTER * self.generator.standard_normal(), 0.0, 1.0)))
        self.params[dimension.name] = value
        return value


@dataclass
class Variation(DimensionSuggester):
    """A policy's parameters, one or two of them drawn anew."""

    parent: Mapping[str, Any]
    anew: LevelSuggester

    @property
    def params(self) -> dict[str, Any]:
        """What was chosen."""
        return self.anew.params

    def choose(self, dimension: Dimension) -> Any:
        name = dimension.name
        if not self._stays(name) or not dimension.holds(self.parent[name]):
            return self.anew.choose(dimension)
        self.params[name] = self.parent[name]
        return self.parent[name]

    def _stays(self, name: str) -> bool:
        return name in self.parent and self.anew.generator.random() >= VARIED / len(self.parent)


@dataclass(frozen=True)
class DefaultDistillation(DimensionSuggester):
    """Asks for everything but the dimensions of USUAL, which stay as near to their usual value as a space allows."""

    asked: Suggester

    def choose(self, dimension: Dimension) -> Any:
        usual = USUAL.get(dimension.name)
        return dimension.asked_of(self.asked) if usual is None else dimension.nearest(usual)


@dataclass(frozen=True)
class PartiallyFixed(DimensionSuggester):
    """Takes what is known of a policy's dimensions, as far as it may be drawn here, and asks for the others; `params` is what was drawn."""

    known: Mapping[str, Any]
    asked: Suggester
    params: dict[str, Any] = field(default_factory=dict)

    def choose(self, dimension: Dimension) -> Any:
        name = dimension.name
        is_known = name in self.known and (dimension.choices is None or dimension.holds(self.known[name]))
        self.params[name] = dimension.nearest(self.known[name]) if is_known else dimension.asked_of(self.asked)
        return self.params[name]


@dataclass(frozen=True)
class DimensionRecorder(DimensionSuggester):
    """Takes the first value of everything, and notes by name which values there are."""

    values: dict[str, tuple[Any, ...]]

    def choose(self, dimension: Dimension) -> Any:
        self.values[dimension.name] = dimension.values()
        return self.values[dimension.name][0]


@dataclass(frozen=True)
class SmallEnd(DimensionSuggester):
    """Takes the small end of everything: the highest ratio of pruning, and these bits where they can be had, else the fewest."""

    bits: int | None

    def choose(self, dimension: Dimension) -> Any:
        if dimension.choices is None:
            is_ratio = dimension.name.startswith("prune") and not dimension.whole
            return dimension.high if is_ratio else dimension.low
        if self.bits in dimension.choices:
            return self.bits
        numbers = [choice for choice in dimension.choices if isinstance(choice, (int, float))]
        return min(numbers) if len(numbers) == len(dimension.choices) else dimension.choices[-1]
