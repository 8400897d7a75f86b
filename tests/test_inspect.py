from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph import Graph
from autocompress.inspect import inspect_model, summary
from autocompress.testing.models import tiny_resnet


def test_a_small_residual_network():
    told = inspect_model("autocompress.testing.models:tiny_resnet")
    assert told["model"] == "autocompress.testing.models:tiny_resnet"
    assert told["input"].startswith("1x3x")
    names = [layer["name"] for layer in told["layers"]]
    assert len(names) == len(set(names)) == 8
    assert {"conv1", "linear", "layer3.0.conv2"} <= set(names)
    for group in told["channel_groups"]:
        assert group["channels"] > 0
        assert group["written_by"] >= 1
        assert group["can_change"] or group["reason"], "what stays says why"
    assert [block["name"] for block in told["blocks"]] == ["layer1.0"]
    assert all(entry["reason"] for entry in told["frozen"])


def test_shares_are_of_the_weights():
    graph = Graph.trace(tiny_resnet(), (torch.randn(1, 3, 32, 32),))
    told = summary(graph)
    model = tiny_resnet()
    expected = sum(p.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters())
    assert told["weights_in_layers"] == pytest.approx(expected, rel=0.01)
    dropped = sum(p.numel() for p in (*model.layer1[0].conv1.parameters(), *model.layer1[0].conv2.parameters()))
    assert float(told["weights_in_droppable_blocks"].split()[0]) == pytest.approx(100 * dropped / expected, abs=0.2)
    everything = sum(p.numel() for p in model.parameters())
    assert everything > expected, "norms are no layers"
    assert told["weights_that_can_be_quantized"] == f"{100 * expected / everything:.1f} %"
    free, total = map(int, told["searchable_groups"].split(" of "))
    assert 0 < free <= total == len(graph.groups)


def test_weights_that_nothing_reaches_count_among_all_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.cell(x)[0].mean(1))

    model = Recurrent()
    share = sum(p.numel() for p in model.head.parameters()) / sum(p.numel() for p in model.parameters())
    told = summary(Graph.trace(model, (torch.randn(1, 5, 8),)))
    assert told["weights_that_can_be_quantized"] == f"{100 * share:.1f} %" != "100.0 %"


def test_data_gives_the_shape_of_the_inputs():
    assert inspect_model("autocompress.demo:teacher", data="digits")["input"] == "1x1x8x8"


def test_a_model_that_does_not_load_is_the_user_s_error():
    with pytest.raises(UsageError, match="unknown model"):
        inspect_model("torchvision:resnet19")
