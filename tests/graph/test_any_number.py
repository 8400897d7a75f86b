"""Code that makes a number of the size of the batch: the traced network takes any number of inputs all the same, or says that it cannot."""

import pytest
import torch
from torch import nn

from autocompress.graph import Graph


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.head, self.way = nn.Conv2d(3, 8, 3, 2), nn.Linear(72, 4), way
        self.register_buffer("table", torch.rand(1, 72))

    def forward(self, x):
        return self.head(self.way(self, torch.relu(self.conv(x))))


ALIKE = {
    "shape": lambda net, x: x.view(x.shape[0], -1),
    "len": lambda net, x: x.view(len(x), -1),
    "int": lambda net, x: x.reshape(int(x.size(0)), 72),
    "expanded": lambda net, x: x.flatten(1) + net.table.expand(len(x), 72),
    "made": lambda net, x: x.flatten(1) + torch.ones(len(x), 72) * net.table,
    "share": lambda net, x: x.flatten(1) / len(x),
    "multiple": lambda net, x: x.reshape(2 * len(x), 36).relu().reshape(len(x), 72),
}
EACH = {
    "loop": lambda net, x: torch.stack([one.flatten() for one in x]),
    "constant": lambda net, x: x.flatten(1) + torch.tensor([float(len(x))]),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", [*ALIKE, *EACH])
def test_the_traced_network_takes_any_number_of_inputs(way, batch):
    torch.manual_seed(0)
    model = Net((ALIKE | EACH)[way]).eval()
    graph = Graph.trace(model, (torch.randn(batch, 3, 8, 8),))
    assert bool(graph.opaque_reason) == (way in EACH)
    if way in EACH:
        assert graph.opaque_reason.endswith("its code is for one number of inputs")
    with torch.no_grad():
        for n in (1, 2, 3, 5):
            inputs = torch.randn(n, 3, 8, 8)
            assert torch.allclose(graph.module(inputs), model(inputs), atol=1e-6)
