"""Which of many policies are worth more time: those that together dominate most, the best first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from autocompress.ranking.front import cost, gain, hypervolume, least_counted, measured
from autocompress.records import Outcome

WORST_MARGIN, WORST_SLOWNESS = 0.02, 1.02
"""How far beyond the worst score, and at how many times the slowest latency, the reference point of a hypervolume lies."""
AREA_DIGITS = 12
"""Areas that agree to so many are equal."""
Point = tuple[float, float]
"""Gain (more is better) and latency in seconds."""


def cover(
    points: Sequence[Point], n: int, taken: Sequence[Point] = (), least: Callable[[Sequence[float]], float] = least_counted
) -> list[int]:
    """Indices of the `n` points (gain, latency in seconds) that together dominate most, beside those that are `taken`.

    First the best of all, unless one that is taken is as good: it is what a search under a budget is after.
    Then hypervolume subset selection over gain and logarithm of latency: what lies close to a point that is already there adds little, so
    the chosen spread over the front by themselves. It is greedy (Guerreiro, Fonseca & Paquete 2016, Evolutionary Computation 24(3)), and
    then exchanges one for another as long as that covers more: what greed takes first lies where two would share what it covers.
    The reference is the least gain that counts first: whoever has a budget wants accuracy within it, and networks that are tiny and bad
    would dominate a large area of a plot that nobody looks at. They come last, spread by the whole area. `least` says what counts first.
    """
    if not points:
        return []
    known, gains = [(gain, math.log(latency)) for gain, latency in points], [gain for gain, _ in points]
    beside = [(gain, math.log(latency)) for gain, latency in taken]
    slowest = max(log for _, log in (*known, *beside)) + math.log(WORST_SLOWNESS)
    references = (least(gains), slowest), (min(gains) - WORST_MARGIN, slowest)
    best = max(range(len(points)), key=lambda index: (gains[index], -known[index][1]))
    chosen = [best] if n > 0 and all(gain < gains[best] for gain, _ in beside) else []

    def area(indices: Sequence[int]) -> tuple[float, ...]:
        front = np.array([*beside, *(known[i] for i in indices)])
        return tuple(round(hypervolume(front, reference), AREA_DIGITS) for reference in references)

    def greedy(begun: Sequence[int], pool: Sequence[int]) -> list[int]:
        found, rest = [*begun], [index for index in pool if index not in begun]
        while rest and len(found) < n:
            found.append(max(rest, key=lambda index: area([*found, index])))
            rest.remove(found[-1])
        return found

    best_first, pool = chosen, range(len(points))
    chosen = greedy(best_first, pool)
    while (exchanged := _best_exchange(chosen, len(best_first), pool, area)) is not None:
        chosen = exchanged
    return greedy(best_first, sorted(chosen))


def _best_exchange(
    chosen: Sequence[int], kept: int, pool: Sequence[int], area: Callable[[Sequence[int]], tuple[float, ...]]
) -> list[int] | None:
    """The chosen with the one exchange that covers most, the first `kept` left alone; None where no exchange covers more."""
    others = [index for index in pool if index not in chosen]
    exchanges = [[*chosen[:at], other, *chosen[at + 1 :]] for at in range(kept, len(chosen)) for other in others]
    best = max(exchanges, key=area, default=None)
    return best if best is not None and area(best) > area(chosen) else None


def promoted(
    outcomes: Sequence[Outcome],
    n: int,
    settled: Sequence[Outcome] = (),
    merit: Callable[[Outcome], float] = gain,
    least: Callable[[Sequence[float]], float] = least_counted,
) -> list[Outcome]:
    """The `n` outcomes that cover most, beside those that are `settled` (trained to the end, or in no need of it).

    merit: what is covered beside cost; the score where nothing else is said. least: see `cover`.
    """

    def points(known: Sequence[Outcome]) -> list[Point]:
        return [(merit(o), cost(o)) for o in known]

    candidates = measured(outcomes)
    return [candidates[index] for index in cover(points(candidates), n, points(measured(settled)), least)]
