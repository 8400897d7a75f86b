"""What can be known of policies before anything is trained: what they take on the device, and whether any can meet the budget."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from autocompress.budget import Budget
from autocompress.candidates.proposals import Proposal, capacity, inheritance
from autocompress.devices.timing import MOST_DRIFT
from autocompress.errors import PolicyFailure
from autocompress.graph import Structure
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.policy import Policy
from autocompress.records import Measurement, Outcome, Prediction
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.search_space import Suggest, with_default_distillation
from autocompress.setup.setting import Setting
from autocompress.system.failures import policy_errors
from autocompress.trial.starting import UNTRAINED, untrained_student
from autocompress.workload import Workload

UNTRAINED_SECONDS_EACH = 0.3
"""Of measuring a network that is only timed."""
SLOW_ORIGINAL_S = 0.25
"""An original that takes longer is not measured beside networks that are only timed: its rounds would take as long as their training."""
MOST_WEIGHT_BYTES = 2**31 - 2**27
"""An ONNX file is one protobuf message, which holds 2 GiB at most."""
FEASIBILITY_SLACK = 1.5
"""Latency is a step function of channels, so that the smallest policy need not be the fastest: within this factor of a limit a budget is
not refused before the space was looked at."""


@dataclass(frozen=True)
class Untrained:
    """What a policy's structure took on the device, and takes in a file.

    original: what that took beside it; None where it is too slow to be measured each time.
    """

    policy: Policy
    latency_s: Measurement
    size_bytes: int
    original: Measurement | None = None


@dataclass
class Forecast:
    """Predictions for the policies of one search; every network that is measured makes them better.

    space: draws policies; all that are looked at here are distilled as usual, see `suggest`.
    limits: the budget as it was asked for, perhaps relative to the original's latency.
    networks: workload and measured latency by the structure of a policy, in units of what the original took beside it: what the latency
        model is fitted on. A machine that is slower for a while, or from now on, is so for both.
    """

    setting: Setting
    space: Suggest
    limits: Budget
    model: FittedLatencyModel
    networks: dict[Structure, tuple[Workload, float]] = field(default_factory=dict)
    untrained: dict[str, tuple[Policy, float]] = field(default_factory=dict)
    """By digest: policies whose networks were measured untrained, and what they took, in the same units; trained ones are outcomes."""
    _first_predictions: dict[Structure, Prediction] = field(default_factory=dict)

    @classmethod
    def start(cls, setting: Setting, space: Suggest, limits: Budget) -> Self:
        """With what was measured on this device before."""
        return cls(setting, space, limits, FittedLatencyModel(OperatorTable.for_device(setting.device)))

    @property
    def suggest(self) -> Suggest:
        """The space, for a draw of a structure."""
        return with_default_distillation(self.space)

    @property
    def budget(self) -> Budget:
        """The limits, against what the original took lately, which predictions refer to as well."""
        return self.limits.against(self.recent_baseline_s)

    @functools.cached_property
    def teacher_workload(self) -> Workload:
        """The unchanged model's workload."""
        return self.workload(Policy())

    # -- of one policy --------------------------------------------------------------------------------------------

    def workload(self, policy: Policy) -> Workload:
        return self.setting.graph_of(policy).workload(policy)

    def structure(self, policy: Policy) -> Structure:
        return self.setting.graph_of(policy).structure(policy)

    def predict(self, policy: Policy) -> Prediction:
        return self.model.predict(self.workload(policy))

    def violation(self, workload: Workload, latency_s: float, budget: Budget | None = None) -> float:
        """Relative excess over the budget as predicted; the file is larger than its weights by as much as the baseline's.

        A network whose weights no file can hold is over every budget.
        """
        if workload.weight_bytes > MOST_WEIGHT_BYTES:
            return workload.weight_bytes / MOST_WEIGHT_BYTES - 1
        baseline = self.setting.baseline
        overhead = baseline.size_bytes - self.teacher_workload.weight_bytes
        p95 = latency_s * baseline.latency_s.tail / baseline.latency_s.median
        return (budget or self.budget).violation(latency_s, workload.weight_bytes + max(0, overhead), p95)

    def upper(self, latency_s: float) -> float:
        """The upper end of an interval around it as wide as the original's, which is what a budget limits; beyond drift it is noise."""
        measured = self.setting.baseline.latency_s
        return latency_s * min(measured.high / measured.median, 1 + MOST_DRIFT)

    def proposal(self, policy: Policy, params: dict[str, Any]) -> Proposal:
        return self.proposals([policy], [params])[0]

    def proposals(self, policies: Sequence[Policy], params: Sequence[dict[str, Any]]) -> list[Proposal]:
        """What is known of several policies before training; many at once take hardly longer than one."""
        known: dict[int, Proposal] = {}
        for reference in {policy.student.reference for policy in policies}:
            members = [index for index, policy in enumerate(policies) if policy.student.reference == reference]
            graph = self.setting.graph_of(policies[members[0]])
            own = [policies[index] for index in members]
            grown, kept = (graph.workloads(graph.population(own, grown=g)) for g in (True, False))
            facts = zip(grown, self.model.values(grown).tolist(), inheritance(kept, self.teacher_workload), capacity(grown), strict=True)
            for index, (workload, latency_s, share, size) in zip(members, facts, strict=True):
                known[index] = Proposal(policies[index], params[index], workload, latency_s, share, size)
        return [known[index] for index in range(len(policies))]

    @property
    def latency_limit(self) -> float:
        """Seconds up to which policies are of interest: the budget, else the original's latency."""
        limits = [limit for limit in (self.budget.latency_s, self.budget.p95_s) if limit is not None]
        return min([*limits, self.recent_baseline_s])

    def within_budget(self, pool: Sequence[Proposal], *, margin: float = 0.0) -> list[Proposal]:
        """The pool with latencies as predicted by now, without what is over the budget, or would be if it were slower by `margin`."""
        now = [replace(p, latency_s=self.latency_s(p)) for p in pool]
        return [p for p in now if self.violation(p.workload, self.upper((1 + margin) * p.latency_s)) <= 0]

    def least_excess(self, proposal: Proposal, *, margin: float = 0.0) -> float:
        """Relative excess over the budget, were the policy slower by `margin`: as measured, or the least that prediction leaves open."""
        slower, known = 1 + margin, self._measured(proposal.policy)
        if known is not None:
            return self.violation(proposal.workload, self.upper(slower * known))
        return self.violation(proposal.workload, slower * self.model.predict(proposal.workload).low)

    def settled_excess(self, proposal: Proposal, *, margin: float = 0.0) -> float:
        """Relative excess over the budget, were the policy slower by `margin`; measured, where prediction leaves open whether there is any.

        To measure the untrained network takes seconds, and to train what turns out to be over the budget takes minutes.
        """
        slower, least = 1 + margin, self.least_excess(proposal, margin=margin)
        highest = self.model.predict(proposal.workload).high
        if self.is_measured(proposal.policy) or least > 0 or self.violation(proposal.workload, slower * highest) <= 0:
            return least
        found = self.measure_untrained(proposal.policy)
        self.refit()
        return self.violation_of(found, self.limits, slower=slower) if found is not None else least

    def latency_s(self, proposal: Proposal) -> float:
        """Seconds as they were measured, else as they are predicted by now."""
        return self._measured(proposal.policy) or self.model.predict(proposal.workload).value

    def is_measured(self, policy: Policy) -> bool:
        """Whether its network was, trained or not."""
        return self._measured(policy) is not None

    def _measured(self, policy: Policy) -> float | None:
        """Seconds that the policy's network takes, where it has been measured: beside an original as fast as it was lately."""
        known = self.networks.get(self.structure(policy).timed)
        return known[1] * self.recent_baseline_s if known is not None else None

    @property
    def recent_baseline_s(self) -> float:
        """What the original took lately."""
        return self.setting.recent_baseline.median

    # -- learning from the device -------------------------------------------------------------------------------------

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Fit the latency model to what has been measured of these, beside what it knew."""
        for outcome in outcomes:
            if outcome.latency_s is not None:
                self.note(outcome.policy, outcome.latency_s.relative(self.recent_baseline_s))
        self.refit()

    def refit(self) -> None:
        """Fit the latency model to all that has been measured."""
        self.model.fit([(workload, originals * self.recent_baseline_s) for workload, originals in self.networks.values()])

    def note(self, policy: Policy, originals: float) -> None:
        """Keep what the policy's network took, in units of what the original took beside it."""
        structure = self.structure(policy).timed
        if structure not in self.networks and len(self.model.table):
            self._first_predictions[structure] = self.predict(policy)
        self.networks[structure] = (self.workload(policy), originals)

    def note_untrained(self, policy: Policy, originals: float) -> None:
        """The same of one that is not trained: a resumed search is told of it again."""
        self.untrained[policy.digest] = (policy, originals)
        self.note(policy, originals)

    def first_prediction(self, policy: Policy) -> Prediction:
        """As it was predicted before its network was first measured: what prediction is judged by."""
        return self._first_predictions.get(self.structure(policy).timed) or self.predict(policy)

    def measure_untrained(self, policy: Policy) -> Untrained | None:
        """What the policy's structure takes; None when it cannot be built."""
        models, spend = self.setting.models, self.setting.ledger.spend
        with spend("measure"), tempfile.TemporaryDirectory(prefix=UNTRAINED, dir=models) as name:
            folder = Path(name)
            try:
                with policy_errors(self.setting.log):
                    manifest = self.setting.write(
                        folder, untrained_student(self.setting, policy, calibration_inputs=FEWEST_EXAMPLES), policy
                    )
                    beside_it = [self.setting.baseline.path] if self.recent_baseline_s <= SLOW_ORIGINAL_S else []
                    paths = [*beside_it, folder / manifest.artifact]
                    *beside, latency = self.setting.device.measure(paths, seconds_each=UNTRAINED_SECONDS_EACH)
            except PolicyFailure:
                return None
        original = beside[0] if beside else None
        self.note_untrained(policy, latency.median / (original.median if original is not None else self.recent_baseline_s))
        return Untrained(policy, latency, manifest.size_bytes, original)

    def usual(self, found: Untrained) -> Measurement:
        """What it takes beside an original as fast as that was lately."""
        return found.latency_s.times(self.recent_baseline_s / found.original.median) if found.original is not None else found.latency_s

    def violation_of(self, found: Untrained, limits: Budget, *, slower: float = 1.0) -> float:
        """Relative excess over the limits, were it so many times slower."""
        latency = self.usual(found).times(slower)
        return limits.against(self.recent_baseline_s).violation(latency.high, found.size_bytes, latency.tail)

    def add_to_baseline_history(self, found: Untrained | None) -> None:
        """Count what the original took beside this network among what it took lately.

        Not for the candidates of one choice: a few slow seconds would outvote all that is known of the machine.
        """
        if found is not None and found.original is not None:
            self.setting.baseline_history.append(found.original)
