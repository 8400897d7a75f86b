"""A search space as a table: its dimensions, the values that each may take, and the policies that differ from one in a single value."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autocompress.candidates.forecast import Forecast
from autocompress.candidates.proposals import Proposal
from autocompress.suggesters import DimensionRecorder, PartiallyFixed

PASSES = 8
"""Times that every dimension is looked at in search of the least compressed policy; a value that leads changes which others do."""
Params = Mapping[str, Any]


@dataclass
class Dimensions:
    """The dimensions of a forecast's space; those that only some policies have are found when one is drawn."""

    forecast: Forecast
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @functools.cached_property
    def base(self) -> Proposal:
        """The least compressed policy of the space: it keeps most of the teacher, and of those it is most like it in size."""
        current = self.drawn([{}])[0]
        for _ in range(PASSES):
            best = {name: max(around, key=self._closeness).params[name] for name, around in self.around(current.params).items()}
            alone = self.drawn([{**current.params, name: value} for name, value in best.items()])
            together = self.drawn([{**current.params, **best}])[0]
            following = max([current, together, *alone], key=self._closeness)
            if following is current:
                break
            current = following
        return current

    def _closeness(self, proposal: Proposal) -> tuple[float, ...]:
        """To the original: by what is inherited; then by the number of parameters, which tells added channels; then by bytes."""
        own, whole = proposal.workload, self.forecast.teacher_workload
        ratios = (max(1, own.params) / max(1, whole.params), max(1, own.weight_bytes) / max(1, whole.weight_bytes))
        return round(proposal.inheritance, 9), *(-round(abs(math.log(ratio)), 9) for ratio in ratios)

    def around(self, centre: Params) -> dict[str, list[Proposal]]:
        """For each dimension the policies that differ from this one in its value alone, in the order of the values."""
        known = dict(self.values)  # drawing may find others
        drawn = iter(self.drawn([{**centre, name: value} for name, values in known.items() for value in values]))
        return {name: [next(drawn) for _ in values] for name, values in known.items()}

    def drawn(self, params: Sequence[Params]) -> list[Proposal]:
        """A policy for each of these; dimensions that they leave open take their first value, and are known from then on."""
        recorder = DimensionRecorder(self.values)
        suggesters = [PartiallyFixed(told, recorder) for told in params]
        policies = [self.forecast.suggest(suggester) for suggester in suggesters]
        first = {name: values[0] for name, values in self.values.items()}
        return self.forecast.proposals(policies, [{**first, **suggester.known, **suggester.params} for suggester in suggesters])
