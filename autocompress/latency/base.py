"""LatencyModel: what a policy's student will take on a device, before it exists. A model predicts; only a device measures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from autocompress.records import Prediction
from autocompress.workload import Workload


class LatencyModel(ABC):
    """Predicts seconds from a workload. Pure and fast: no weights, no device."""

    @abstractmethod
    def predict(self, workload: Workload) -> Prediction:
        """Seconds of one call, with a 90 % interval."""

    @abstractmethod
    def seconds_by_operator(self, workload: Workload) -> list[tuple[str, float]]:
        """(operator name, seconds) in execution order; together with the overhead of a call they make the prediction."""
