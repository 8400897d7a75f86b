"""A sampler that gives way to random draws where it fails: what was found is worth more than what it would have suggested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from autocompress.errors import one_line

T = TypeVar("T")


def ends_study(error: Exception) -> bool:
    """Whether a sampler has asked for the end of its study, as those that walk a grid do; Optuna allows that where it runs it itself."""
    return isinstance(error, RuntimeError) and "Study.stop" in str(error)


class OrRandom(BaseSampler):  # type: ignore[misc]  # Optuna has no types
    """Another sampler, or RandomSampler in its place wherever it raises; each draw is asked of the other one first.

    failure: what it raised first, in words. Errors of the storage pass: there is nothing to draw for without one.
    """

    def __init__(self, sampler: BaseSampler, seed: int) -> None:
        self.sampler = sampler
        self.failure: str | None = None
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._tried(lambda: self.sampler.infer_relative_search_space(study, trial), dict)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._tried(lambda: self.sampler.sample_relative(study, trial, search_space), dict)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        asked = study, trial, param_name, param_distribution
        return self._tried(lambda: self.sampler.sample_independent(*asked), lambda: self._random.sample_independent(*asked))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._tried(lambda: self.sampler.before_trial(study, trial), lambda: None)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._tried(lambda: self.sampler.after_trial(study, trial, state, values), lambda: None)

    def reseed_rng(self) -> None:
        self.sampler.reseed_rng()

    def _tried(self, draw: Callable[[], T], instead: Callable[[], T]) -> T:
        try:
            return draw()
        except StorageInternalError:
            raise
        except Exception as error:  # whatever a sampler of the user's raises, or the numbers of a model
            if ends_study(error):
                raise
            self.failure = self.failure or one_line(error)
            return instead()
