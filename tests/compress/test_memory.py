"""How much a network holds at once, and how much of it that lets be asked together."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from autocompress.compress import memory
from autocompress.graph import Graph
from autocompress.system import machine
from autocompress.testing.models import tiny_resnet


class Skipping(nn.Module):
    """Holds a large map until the end, while small ones come and go."""

    def forward(self, x):
        wide = torch.cat([x, x], 1)
        small = x[:, :1]
        for _ in range(3):
            small = small + 1
        return wide + small


def test_a_value_is_held_from_where_it_is_made_to_its_last_reader():
    traced = Graph.trace(Skipping().eval(), (torch.zeros(2, 4, 8, 8),)).module
    size = 4 * 64  # bytes of a channel of one input
    assert memory.peak_bytes(traced) == size * (8 + 8 + 1), "what is concatenated is no longer needed at the end"
    assert memory.peak_bytes(nn.Linear(2, 2)) == 0, "nothing tells"


@pytest.mark.parametrize(("free", "most"), [(10**12, 256), (10**6, 7), (1, 1)])
def test_no_more_is_asked_at_once_than_the_memory_bears(monkeypatch, free, most):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "peak_bytes", lambda model: 70_000)
    traced = Graph.trace(tiny_resnet().eval(), (torch.zeros(1, 3, 8, 8),)).module
    assert memory.inputs_that_fit(traced, 256, torch.device("cpu")) == most


@pytest.mark.skipif(machine.held_bytes() is None, reason="this system does not say what a process holds")
def test_who_asks_for_more_than_is_free_gets_an_error(monkeypatch):
    """Else the system would end the whole search."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**28)
    monkeypatch.setattr(memory, "best_training_device", lambda: torch.device("cpu"))
    with memory.bounded_memory():
        assert torch.zeros(2**24).sum() == 0, "64 MB"
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(2**30)
    assert memory.is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
