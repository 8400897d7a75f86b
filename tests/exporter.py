"""The exporter of torch, sped up for test suites that export hundreds of tiny networks."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings


def export_faster() -> None:
    """Let torch's exporter look through its operator libraries once, and not at every export; a global patch, for tests only."""
    with contextlib.suppress(ImportError, AttributeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not getattr(ONNXRegistry, "_kept", False):
            registry = ONNXRegistry.from_torchlib()
            ONNXRegistry.from_torchlib = classmethod(lambda cls, *_, **__: copy.copy(registry))
            ONNXRegistry._kept = True
    with contextlib.suppress(ImportError, AttributeError):
        from torch._export import utils

        utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)  # which gives nothing, and fills what is kept
