"""Networks that overwrite tensors: the traced network computes what they compute, and nothing that was given is overwritten."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.compress.student import build_student
from autocompress.data import Data, Split
from autocompress.graph import Graph
from autocompress.policy import Policy

INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def statement_of_a_module(net, x):
    x = net.conv(x)
    net.relu(x)
    return net.head(x.mean((2, 3)))


def a_module_twice(net, x):
    x = net.conv(x)
    net.relu(x)
    y = net.conv2(x)
    net.relu(y)
    return net.head((x + y).mean((2, 3)))


def statement_of_a_method(net, x):
    x = net.conv(x)
    x.mul_(2.0).clamp_(-1.0, 1.0)
    return net.head(x.mean((2, 3)))


def statement_of_a_function(net, x):
    x = net.conv(x)
    F.relu(x, inplace=True)
    return net.head(x.mean((2, 3)))


def another_name_of_the_same_tensor(net, x):
    x = net.conv(x)
    same = x
    x += 1.0
    return net.head((x * same).mean((2, 3)))


def its_own_input(net, x):
    x.mul_(2.0)
    return net.head(net.conv(x).mean((2, 3)))


def its_own_input_on_a_path_of_its_own(net, x):
    x.mul_(2.0)
    if bool(x.isnan().any()):
        x = torch.nan_to_num(x)
    return net.head(net.conv(x).mean((2, 3)))


def a_view(net, x):
    x = net.conv(x)
    x.flatten(1).relu_()
    return net.head(x.mean((2, 3)))


def a_part(net, x):
    x = net.conv(x)
    x[:, 2:5] = x[:, :3] * 2.0
    x[:, 0].zero_()
    return net.head(x.mean((2, 3)))


def a_view_made_before(net, x):
    x = net.conv(x)
    before, after = x.permute(0, 2, 3, 1), x.relu_().permute(0, 2, 3, 1)
    return net.head((before + 2.0 * after).mean((1, 2)))


def a_view_made_afterwards(net, x):
    x = net.conv(x)
    x += 1.0
    y = x.relu_().permute(0, 2, 3, 1)
    return net.head((y * x.permute(0, 2, 3, 1)).mean((1, 2)))


def a_view_between_two_writes(net, x):
    x = net.conv(x)
    x += 1.0
    y = x.permute(0, 2, 3, 1)
    x.relu_()
    return net.head(y.mean((1, 2)))


def a_constant(net, x):
    mask = x.new_zeros(1, 8, 1, 1)
    mask[:, :3] += 1.0
    mask[:, 2:4] += 2.0
    return net.head((net.conv(x) * mask).mean((2, 3)))


def a_constant_between_two_writes(net, x):
    mask = torch.zeros(1, 8, 1, 1)
    mask[:, :3] += 1.0
    x = net.conv(x) * mask
    mask[:, 2:4] += 2.0
    return net.head((x * mask).mean((2, 3)))


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.conv2, self.relu, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Linear(8, 5)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


QUICK = (
    statement_of_a_module, a_module_twice, statement_of_a_method, statement_of_a_function, another_name_of_the_same_tensor, its_own_input,
    a_view_made_afterwards, a_constant,
)  # fmt: skip
"""What needs no other pass of torch's over the whole network, which takes several times as long as tracing it."""
WAYS = (
    *QUICK, its_own_input_on_a_path_of_its_own, a_view, a_part, a_view_made_before, a_view_between_two_writes, a_constant_between_two_writes
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_student_that_changes_nothing_computes_what_the_model_does(way, monkeypatch):
    torch.manual_seed(0)
    if way in QUICK:
        monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *_: pytest.fail("takes long"))
    net, example, inputs = Net(way).eval(), INPUTS[:2].clone(), INPUTS.clone()
    before = copy.deepcopy(net.state_dict())
    graph = Graph.trace(net, (example,))
    with torch.inference_mode():
        expected = net(inputs.clone())
        assert torch.allclose(build_student(graph, Policy()).eval()(inputs), expected, atol=1e-6)
    assert torch.equal(example, INPUTS[:2]) and torch.equal(inputs, INPUTS)
    assert net.relu.inplace
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    assert not graph.opaque_reason


def test_data_is_not_overwritten_by_a_network_that_overwrites_its_input():
    inputs = INPUTS.clone()
    split = Split(inputs, torch.zeros(4, dtype=torch.long))
    data = Data(split, split, split, classes=5)
    for batch, _ in data.batches(data.val, 2):
        batch.mul_(2.0)
    assert torch.equal(inputs, INPUTS)
