from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.networks import network
from torch import nn

from autocompress.commands.inspect import inspect_model, summary
from autocompress.errors import UsageError
from autocompress.graph import Graph
from autocompress.graph.outline import outline
from autocompress.policy import Policy
from autocompress.report.network import lay_out, network_page
from autocompress.testing.devices import FakeDevice
from autocompress.testing.models import tiny_resnet
from autocompress.workload import OutlineStep


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


def test_the_steps_are_what_a_runtime_executes_and_all_parameters_are_counted_once():
    model = tiny_resnet()
    graph = Graph.trace(model, (torch.randn(1, 3, 32, 32),))
    steps = outline(graph)
    assert sum(step.params for step in steps) == sum(p.numel() for p in model.parameters())
    assert sum(step.macs for step in steps) == graph.workload(Policy()).macs
    assert all(source < number for number, step in enumerate(steps) for source in step.inputs)
    by_name = {step.name: step for step in steps}
    assert by_name["layer1.0.conv1"].title == "conv 3×3 · batch norm · relu"
    assert (by_name["layer1.0.conv1"].group, by_name["layer1.0.conv1"].block) == ("layer1.0.conv1", "layer1.0")
    assert by_name["layer1.0.conv1"].line == "models.py:22", "the line that calls the layer, not torch's own"
    assert (by_name["layer2.0.conv2"].block, by_name["linear"].block) == (None, None)
    added = steps[by_name["add"].inputs[0]], steps[by_name["add"].inputs[1]]
    assert {step.name for step in added} == {"layer1.0.conv2", "conv1"}


def test_views_of_views_are_one_step():
    model, inputs = network("tokens")
    titles = [step.title for step in outline(Graph.trace(model, (inputs,)))]
    assert "flatten · transpose" in titles
    assert titles.count("layer norm") == 2


@given(st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=30))
def test_every_tensor_keeps_a_lane_of_its_own_until_its_last_reader(reads):
    steps = [step_of(tuple({source for source in sources if source < number})) for number, sources in enumerate(reads)]
    living: dict[int, int] = {}
    last = {source: number for number, step in enumerate(steps) for source in step.inputs}
    for number, row in enumerate(lay_out(steps)):
        assert {made: lane for lane, made in row.read} == {made: living[made] for made in steps[number].inputs}
        living = {made: lane for made, lane in living.items() if last[made] > number}
        assert dict(map(reversed, row.passing)) == living
        assert row.lane not in living.values()
        if row.is_read:
            living[number] = row.lane
        assert len(set(living.values())) == len(living)


def step_of(inputs):
    return OutlineStep(name="s", title="s", shape=(1,), inputs=inputs, group=None, block=None, params=0, macs=0, line="")


def test_the_page_shows_every_step_in_the_colour_of_its_group_and_escapes_names():
    told = inspect_model("autocompress.testing.models:tiny_resnet")
    told["frozen"].append({"name": "<script>", "reason": "a & b"})
    page = network_page(told)
    assert page.count("<circle") == len(told["steps"])
    assert page.count("&lt;script&gt;") == 1 and "<script" not in page
    chips = re.findall(r'class="chip" style="background: ([^"]+)"', page)
    assert len({colour for colour in chips if colour.startswith("#")}) == sum(group["can_change"] for group in told["channel_groups"])
    assert "http" not in page.replace("http://www.w3.org", "")


def test_operators_are_measured_where_a_device_is_named(monkeypatch):
    monkeypatch.setattr("autocompress.commands.inspect.open_device", lambda name: FakeDevice())
    told = inspect_model("autocompress.testing.models:tiny_resnet", device="fake")
    seconds = {step["name"]: step["latency_s"] for step in told["steps"]}
    assert all(seconds[layer["name"]] > 0 for layer in told["layers"])
    assert sum(float(layer["share_of_latency"].split()[0]) for layer in told["layers"]) <= 100.5
    assert "share_of_latency" not in inspect_model("autocompress.testing.models:tiny_resnet")["layers"][0]
    assert "%" in network_page(told)


def test_data_gives_the_shape_of_the_inputs():
    assert inspect_model("autocompress.demo:teacher", data="digits")["input"] == "1x1x8x8"


def test_a_module_and_data_may_be_objects():
    model, inputs = tiny_resnet(), torch.randn(4, 3, 16, 16)
    told = inspect_model(model, data=[(inputs, torch.arange(4) % 10)] * 3)
    named = inspect_model("autocompress.testing.models:tiny_resnet", input="3x16x16")
    assert told["model"] == "python:" + type(model).__name__
    assert (told["input"], told["layers"]) == ("1x3x16x16", named["layers"])


class Twice(nn.Module):
    """One layer that is called twice, and a norm whose scale is an operator's argument."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.norm, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.layer(torch.relu(self.layer(self.first(x))))))


def twice():
    return Twice()


def test_a_layer_that_is_called_twice_costs_twice():
    told = inspect_model(f"{__file__}:twice", input="6")
    macs = {layer["name"]: layer["macs"] for layer in told["layers"]}
    assert macs == {"first": 48, "layer": 128, "head": 24}
    assert sum(macs.values()) == sum(step["macs"] for step in told["steps"])


def test_a_norm_is_not_said_to_stay_where_it_follows_its_channels():
    model = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    graph = Graph.trace(model.eval(), (torch.randn(2, 6),))
    assert [part.name for part in graph.frozen] == ["2"]


def test_an_input_may_be_tokens(tmp_path):
    (tmp_path / "own.py").write_text(TOKENS)
    told = inspect_model(f"{tmp_path / 'own.py'}:build", input="5:int64")
    assert (told["input"], told["output"]) == ("1x5", "logits")
    assert [layer["name"] for layer in told["layers"]] == ["head"]
    with pytest.raises(UsageError, match="none of the usual image shapes"):
        inspect_model(f"{tmp_path / 'own.py'}:build")


TOKENS = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 4)
    def forward(self, x):
        y = self.table(x).mean(1)
        return {"logits": self.head(y), "features": y}
def build():
    return Net()
"""


def test_a_model_that_does_not_load_is_the_user_s_error():
    with pytest.raises(UsageError, match="unknown model"):
        inspect_model("torchvision:resnet19")
