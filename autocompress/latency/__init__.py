"""Latency models: predict seconds from a workload."""

from autocompress.latency.fitted import FittedLatencyModel
from autocompress.latency.table import OperatorTable

__all__ = ["FittedLatencyModel", "OperatorTable"]
