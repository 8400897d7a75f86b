"""Latency models: predict seconds from a workload."""

from autocompress.latency.base import LatencyModel
from autocompress.latency.fitted import FittedLatencyModel
from autocompress.latency.table import OperatorTable

__all__ = ["FittedLatencyModel", "LatencyModel", "OperatorTable"]
