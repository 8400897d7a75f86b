"""FrontSampler: an Optuna sampler that suggests what is expected to enlarge the Pareto front most.

A Gaussian process for the rank of each objective, over all dimensions of the space together; of many candidates the one with the largest
expected hypervolume improvement (Emmerich, Giannakoglou & Naujoks 2006, IEEE TEVC 10(4)). Ranks, as in a copula, make the search
indifferent to units, outliers and cliffs: all parts of the front count alike, the fast end as much as the accurate one (Binois, Rulliere
& Roustant 2015, "On the estimation of Pareto fronts from the point of view of copula theory"). TPE models each dimension by itself, or
good points as one cloud; a front is many places at once, each with its own trade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from autocompress.ranking.front import non_dominated
from autocompress.study.gaussian import GaussianProcess

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

STARTUP = 12
"""Random trials before anything is modelled."""
MOST_POINTS = 200
"""Of the trials, those nearest to the front are modelled: the cost of a process grows with their cube."""
REFIT_GROWTH = 1.02
"""The processes are fitted again when there are so many times as many trials; until then they only take up what is new."""
RANDOM, MUTANTS = 300, 700
CLIMBS, CLIMBERS, CHILDREN = 3, 10, 150
"""Rounds in which the best so many candidates are varied into so many children."""
FULL_CANDIDATE_COST, LEAST_SHARE = 30_000, 0.35
"""Points times coordinates up to which there are so many candidates; of heavier models they are fewer, down to this share."""
CROSSED = 0.15
"""Share of dimensions that a mutant takes from a second parent."""
NEARBY = 0.1
"""Standard deviation of a small step along a numeric dimension, as part of its range."""


class Space:
    """The dimensions that are suggested together, all at once: a candidate is a row of codes, one for each dimension.

    A code is the index of a choice or of a step, or the position in a continuous range from 0 to 1.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.distributions = dict(distributions)
        every = self.distributions.values()
        self._choices = np.array([len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in every], dtype=np.int64)
        self._steps = np.array([_steps(d) for d in every], dtype=np.float64)
        self.owners = np.repeat(np.arange(len(self._choices)), np.maximum(1, self._choices))
        """For each coordinate, its dimension."""
        first = np.concatenate([[0], np.cumsum(np.maximum(1, self._choices))[:-1]]) if len(self._choices) else np.zeros(0)
        self._level = np.arange(len(self.owners)) - first[self.owners]

    def encode(self, params: Mapping[str, Any]) -> Array:
        return np.array([_encode(d, params[name]) for name, d in self.distributions.items()])

    def decode(self, row: Array) -> dict[str, Any]:
        return {name: _decode(d, float(code)) for (name, d), code in zip(self.distributions.items(), row, strict=True)}

    def points(self, rows: Array) -> Array:
        """Coordinates of each row, so that two choices, or the two ends of a range, are 1 apart."""
        codes, ends = rows[:, self.owners], np.maximum(1.0, self._steps)[self.owners]
        return np.where(self._choices[self.owners] > 0, (codes == self._level) / math.sqrt(2.0), codes / ends)

    def draw(self, n: int, generator: np.random.Generator) -> Array:
        """Rows of uniform values."""
        uniform = generator.random((n, len(self._choices)))
        return np.where(self._steps > 0, np.floor(uniform * (self._steps + 1.0)), uniform)

    def mutants(self, parents: Array, n: int, generator: np.random.Generator) -> Array:
        """Rows that are each one of the parents, with some dimensions of another and one to three (on average) changed.

        A changed number is drawn anew or a small step away, one as likely as the other.
        """
        one, other = (parents[generator.integers(len(parents), size=n)] for _ in range(2))
        children = np.where(generator.random(one.shape) < CROSSED, other, one)
        nearby = (self._choices == 0) & (generator.random(one.shape) < 0.5)
        changes = np.where(nearby, self._stepped(children, generator.standard_normal(one.shape)), self.draw(n, generator))
        rates = generator.integers(1, 4, size=(n, 1)) / len(self._choices)
        return np.where(generator.random(one.shape) < rates, changes, children)

    def _stepped(self, codes: Array, normal: Array) -> Array:
        """The codes after small steps; on a grid of at least one step."""
        grid, ends = self._steps > 0, np.maximum(1.0, self._steps)
        moved = NEARBY * ends * normal
        moved = np.where(grid, np.sign(moved) * np.maximum(1.0, np.round(np.abs(moved))), moved)
        return np.clip(codes + moved, 0.0, ends)


def _steps(distribution: BaseDistribution) -> int:
    """How many steps lie between the ends: of choices, from the first to the last; 0 where the range is continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices) - 1
    low, high, step = _range(distribution)
    return 0 if step is None else math.floor((high - low) / step + 1e-9)


def _range(distribution: BaseDistribution) -> tuple[float, float, float | None]:
    """Ends and step of a range of numbers, in logarithms where it is spaced so."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.log:
        return math.log(distribution.low), math.log(distribution.high), None
    return distribution.low, distribution.high, distribution.step


def _encode(distribution: BaseDistribution, value: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.to_internal_repr(value))
    low, high, step = _range(distribution)
    if step is not None:
        return float(round((value - low) / step))
    return ((math.log(value) if distribution.log else value) - low) / ((high - low) or 1.0)


def _decode(distribution: BaseDistribution, code: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(code)]
    low, high, step = _range(distribution)
    value = low + code * (high - low if step is None else step)
    value = min(distribution.high, max(distribution.low, math.exp(value) if distribution.log else value))
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


@dataclass(frozen=True)
class Evidence:
    """What is known of a study: rows of codes, both objectives (to be maximised), and how far each violates its constraints (<= 0: not)."""

    rows: Array
    values: Array
    violation: Array

    @cached_property
    def sound(self) -> Flags:
        """What keeps the constraints."""
        return self.violation <= 0


def _violation(constraints: Collection[float]) -> float:
    """The largest of a trial's constraints; one that is exactly 0 is kept, but does not say by how much."""
    worst = max(constraints, default=0.0)
    return worst if worst > 0 else max((value for value in constraints if value < 0), default=0.0)


class Memory:
    """What a sampler has read of a study: finished trials do not change."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._signs = np.array([1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions])
        self._trials: list[FrozenTrial] = []
        self._read: set[int] = set()
        self._space = Space({})
        self.evidence = Evidence(np.zeros((0, 0)), np.zeros((0, 2)), np.zeros(0))

    def read(self, study: Study) -> Space:
        """Take up what is new; the dimensions that all complete trials have in common."""
        new = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.number not in self._read]
        shared = self._space.distributions if self._trials else {n: d for t in new[:1] for n, d in t.distributions.items()}
        for trial in new:
            shared = {name: d for name, d in shared.items() if not d.single() and trial.distributions.get(name) == d}
        self._trials += new
        self._read |= {trial.number for trial in new}
        known = self.evidence
        if shared != self._space.distributions:
            self._space = Space(shared)
            known = replace(known, rows=self._rows(self._trials[: len(self._trials) - len(new)]))
        if new:
            self.evidence = Evidence(
                np.concatenate([known.rows, self._rows(new)]),
                np.concatenate([known.values, np.array([trial.values for trial in new]) * self._signs]),
                np.concatenate([known.violation, [_violation(trial.constraints.values()) for trial in new]]),
            )
        return self._space

    def _rows(self, trials: Sequence[FrozenTrial]) -> Array:
        rows = [self._space.encode(trial.params) for trial in trials]
        return np.array(rows).reshape(len(trials), len(self._space.distributions))


class FrontSampler(BaseSampler):  # type: ignore[misc]  # Optuna has no types
    """For studies of two objectives. Dimensions that not all trials have are left to TPE, each for itself.

    A trial that violates a constraint says where the constraints are violated (a process of its own), and nothing of the objectives:
    it may have been ruled out unmeasured.

    Args:
        least: of all values of the first objective the one below which they count as the worst, however fast they are; None: all count.
    """

    def __init__(self, seed: int | None = None, *, least: Callable[[Sequence[float]], float] | None = None) -> None:
        self._least = least
        self._generator = np.random.default_rng(seed)
        self._random, self._single = RandomSampler(seed=seed), TPESampler(seed=seed)
        self._memory: Memory | None = None
        self._space = Space({})
        self._models: dict[str, GaussianProcess] = {}
        self._fitted_at = 0

    def reseed_rng(self) -> None:
        self._generator = np.random.default_rng()
        self._random.reseed_rng()
        self._single.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if len(study.directions) != 2:
            raise ValueError(f"FrontSampler suggests for two objectives, but the study has {len(study.directions)}")
        if self._memory is None or self._memory.study is not study:
            self._memory = Memory(study)
        space = self._memory.read(study)
        if space is not self._space:
            self._space, self._models, self._fitted_at = space, {}, 0
        return dict(space.distributions)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        begun = self._memory is not None and len(self._memory.evidence.rows) >= STARTUP
        sampler = self._single if begun else self._random
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        assert self._memory is not None  # Optuna infers the space first
        evidence = self._memory.evidence
        if not search_space or len(evidence.rows) < STARTUP:
            return {}
        return self._space.decode(self._best(evidence))

    def _best(self, evidence: Evidence) -> Array:
        """The row of codes that promises most, of candidates that are not known."""
        known = {row.tobytes() for row in evidence.rows}
        score, leaders = self._acquisition(evidence)
        weight = min(MOST_POINTS, len(evidence.rows)) * len(self._space.owners)
        share = max(LEAST_SHARE, min(1.0, FULL_CANDIDATE_COST / weight))
        drawn, bred = self._space.draw(int(share * RANDOM), self._generator), int(share * MUTANTS)
        candidates = np.concatenate([drawn, self._space.mutants(leaders, bred, self._generator)])
        best, gains = candidates[:0], np.zeros(0)
        for _ in range(1 + CLIMBS):
            fresh = {row.tobytes(): row for row in candidates if row.tobytes() not in known}
            if fresh:
                known |= fresh.keys()
                rows = np.array(list(fresh.values()))
                best, gains = np.concatenate([best, rows]), np.concatenate([gains, score(self._space.points(rows))])
                order = np.argsort(-gains)[:CLIMBERS]
                best, gains = best[order], gains[order]
            candidates = self._space.mutants(best if len(best) else candidates, int(share * CHILDREN), self._generator)
        return best[0] if len(best) else candidates[0]

    def _acquisition(self, evidence: Evidence) -> tuple[Callable[[Array], Array], Array]:
        """What points promise: expected hypervolume improvement times the chance to keep the constraints; and the rows of the front.

        While nothing keeps the constraints, the chance that they do, and the rows that are closest to it.
        """
        refit = len(evidence.rows) >= REFIT_GROWTH * self._fitted_at
        self._fitted_at = len(evidence.rows) if refit else self._fitted_at
        limits = self._limits(evidence, fit=refit)
        if limits is not None and not evidence.sound.any():
            return lambda points: _margin(limits, points), evidence.rows[np.argsort(evidence.violation)[:CLIMBERS]]
        rows, values = evidence.rows[evidence.sound], self._ranks(evidence.values[evidence.sound])
        kept, leading = _nearest_to_front(values), non_dominated(values * [1.0, -1.0])
        first, second = (self._model(name, rows[kept], values[kept, k], fit=refit) for k, name in enumerate(("first", "second")))
        front = values[leading]

        def score(points: Array) -> Array:
            (mean_1, deviation_1), (mean_2, deviation_2) = first.predict(points), second.predict(points)
            improvement = expected_improvement(front, np.stack([mean_1, mean_2], 1), np.stack([deviation_1, deviation_2], 1))
            return improvement if limits is None else improvement * ndtr(_margin(limits, points))

        return score, rows[leading]

    def _ranks(self, values: Array) -> Array:
        """Of each column, from above 0 (the worst) to 1 among those that count; equal values have equal ranks."""
        counted = values if self._least is None else values[values[:, 0] >= self._least(values[:, 0].tolist())]
        ordered = np.sort(counted, axis=0)
        ends = [[np.searchsorted(ordered[:, k], values[:, k], side) for side in ("left", "right")] for k in range(values.shape[1])]
        return np.stack([np.minimum((low + high + 1) / (2 * len(counted)), 1.0) for low, high in ends], axis=1)

    def _limits(self, evidence: Evidence, *, fit: bool) -> GaussianProcess | None:
        """How far points violate the constraints, learnt from both sides; None where nothing does."""
        if evidence.sound.all():
            return None
        chosen = _of_both_sides(evidence.violation)
        return self._model("limits", evidence.rows[chosen], np.clip(evidence.violation[chosen], -1.0, 1.0), fit=fit)

    def _model(self, name: str, rows: Array, values: Array, *, fit: bool) -> GaussianProcess:
        before = self._models.get(name)
        start = before.theta if before is not None else None
        model = GaussianProcess(self._space.points(rows), values, self._space.owners, start=start, fit=fit or before is None)
        self._models[name] = model
        return model


def _of_both_sides(violation: Array) -> NDArray[np.int64]:
    """Indices of at most MOST_POINTS, as many that violate as that do not, as far as there are; spread from the limit to the farthest.

    Those next to the limit alone would leave it open what lies beyond: there is always another one that is as close.
    """
    sides = [np.flatnonzero(violation > 0), np.flatnonzero(violation <= 0)]
    chosen = []
    for own, other in (sides, sides[::-1]):
        room = min(len(own), max(MOST_POINTS // 2, MOST_POINTS - len(other)))
        outwards = own[np.argsort(np.abs(violation[own]), kind="stable")]
        chosen.append(outwards[np.linspace(0, len(own) - 1, room).astype(np.int64)])
    return np.concatenate(chosen)


def _margin(limits: GaussianProcess, points: Array) -> Array:
    """By how many standard deviations points are expected to keep the constraints."""
    mean, deviation = limits.predict(points)
    return -mean / deviation


def expected_improvement(front: Array, mean: Array, deviation: Array) -> Array:
    """Expected hypervolume improvement, up to the origin, of independent normals whose both coordinates are to be maximised.

    Args:
        front: m x 2, not dominated, above the origin. mean, deviation: n x 2.

    Between two neighbours of the front a point adds (its part of the strip between their first coordinates) times (its second coordinate
    above the height of the strip), and the two are independent: the expectation is a sum of products.
    """
    front = front[np.argsort(front[:, 0])]
    edges = np.concatenate([[0.0], front[:, 0]])
    heights = np.concatenate([front[:, 1], [0.0]])
    beyond = _expected_excess(edges, mean[:, :1], deviation[:, :1])
    widths = beyond - np.concatenate([beyond[:, 1:], np.zeros((len(mean), 1))], axis=1)
    return (widths * _expected_excess(heights, mean[:, 1:], deviation[:, 1:])).sum(1)


def _expected_excess(limit: Array, mean: Array, deviation: Array) -> Array:
    """Expectation of how far a normal lies above the limit, 0 where it lies below."""
    z = (mean - limit) / deviation
    return deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi))


def _nearest_to_front(values: Array) -> NDArray[np.int64]:
    """Indices of at most MOST_POINTS, layer by layer of non-domination."""
    left = np.arange(len(values))
    layers: list[NDArray[np.int64]] = []
    while len(left) and sum(map(len, layers)) < MOST_POINTS:
        layer = non_dominated(values[left] * [1.0, -1.0])
        layers.append(left[layer])
        left = left[~layer]
    return np.concatenate(layers)[:MOST_POINTS]
