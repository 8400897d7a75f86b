"""Torch's exporters are patched only meanwhile, and what they make is the same."""

from __future__ import annotations

import gc

import onnx
import pytest
import torch
from torch import nn
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

from autocompress.system import quick
from autocompress.system.quick import quick_export, quick_trace


def exported(model, example):
    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    return program.model_proto


def test_the_file_is_the_same_with_and_without():
    torch.manual_seed(0)
    model, example = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5)).eval(),
        torch.randn(1, 3, 8, 8),
    )
    plain = exported(model, example)
    for _ in range(2):
        with quick_export():
            again = exported(model, example)
        assert [node.op_type for node in again.graph.node] == [node.op_type for node in plain.graph.node]
        weights = [[onnx.numpy_helper.to_array(value).tolist() for value in proto.graph.initializer] for proto in (plain, again)]
        assert weights[0] == weights[1]


def test_all_is_as_before_afterwards_also_where_an_export_fails():
    before = vars(ONNXRegistry)["from_torchlib"], utils._materialize_cpp_cia_ops
    for _ in range(2):
        with pytest.raises(ValueError, match="no such operator"), quick_export():
            assert not gc.isenabled()
            assert utils._materialize_cpp_cia_ops is not before[1]
            raise ValueError("no such operator")
        assert (vars(ONNXRegistry)["from_torchlib"], utils._materialize_cpp_cia_ops) == before
        assert gc.isenabled()
    gc.disable()
    try:
        with quick_trace():
            pass
        assert not gc.isenabled(), "somebody else had his reasons"
    finally:
        gc.enable()


def test_what_one_export_adds_to_the_registry_is_not_there_for_the_next():
    with quick_export():
        first, second = ONNXRegistry.from_torchlib(), ONNXRegistry.from_torchlib()
        assert first.functions == second.functions
        known = next(iter(first.functions))
        before = len(second.functions[known])
        first.functions[known].append("mine")
        first.functions["new"] = []
        for registry in (second, ONNXRegistry.from_torchlib()):
            assert len(registry.functions[known]) == before and "new" not in registry.functions


def test_a_torch_that_has_these_no_longer_exports_all_the_same(monkeypatch):
    quick._registering_once.cache_clear()
    monkeypatch.delattr(ONNXRegistry, "from_torchlib")
    with quick_export():
        pass
    quick._registering_once.cache_clear()
