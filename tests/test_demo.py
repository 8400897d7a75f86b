"""The network of the demonstration: wide enough to need compression, and the same in every session of a search."""

from __future__ import annotations

import functools

import pytest
import torch

from autocompress.demo import WIDTHS, teacher
from autocompress.errors import PolicyFailure
from autocompress.graph import Graph
from autocompress.models import load_model
from autocompress.policy import Policy
from autocompress.references import DEMO, names_function
from autocompress.setup.demo_size import TIMES_BUDGET, of_fitting_size, reference_for
from autocompress.task import TASK_FILE, Task
from autocompress.testing.devices import Costs, FakeDevice

LIMIT_S = 10e-3


@functools.cache
def macs() -> int:
    return Graph.trace(teacher().eval(), (torch.zeros(32, 1, 8, 8),)).workload(Policy()).macs


def on_a_processor(times: float) -> FakeDevice:
    """That takes so many times as long as the budget for the narrowest network."""
    return FakeDevice(Costs(call=0.0, node=0.0, element=0.0, mac=times * LIMIT_S / macs()))


WIDE_ENOUGH = [(3.6, "teacher"), (1.6, "teacher_80"), (0.1, "teacher_128")]


@pytest.mark.parametrize(("times", "name"), WIDE_ENOUGH)
def test_the_network_is_as_wide_as_it_must_be_to_miss_the_budget(times, name):
    assert reference_for(on_a_processor(times), LIMIT_S, 32) == DEMO + name


@pytest.mark.parametrize("name", WIDTHS)
def test_every_network_can_be_named(name):
    assert not names_function(DEMO + name), "it is no code of the user's"
    model = load_model(DEMO + name)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert model.stem[0].out_channels == WIDTHS[name][0]


def test_it_is_chosen_once_for_a_search(tmp_path):
    task, fast, slow = Task(budget=("10ms",), batch=32), on_a_processor(1.6), on_a_processor(2 * TIMES_BUDGET)
    chosen = of_fitting_size(task, None, fast)
    assert chosen.model == f"{DEMO}teacher_80" and chosen.is_demo
    (tmp_path / TASK_FILE).write_text(chosen.to_toml())
    assert of_fitting_size(task, tmp_path, slow) == chosen, "a search that is resumed, or learned from, keeps its network"
    assert of_fitting_size(task, tmp_path / "absent", fast) == task
    assert of_fitting_size(chosen, None, slow) == chosen, "as it was asked for"


OTHERS = [Task(), Task(budget=("0.5x",)), Task(budget=("4MB",)), Task(budget=("1ms",), model="own:net", data="own:data")]


@pytest.mark.parametrize("task", OTHERS)
def test_without_a_budget_in_seconds_it_is_the_usual_one(task):
    assert of_fitting_size(task, None, on_a_processor(0.1)) == task


def test_where_nothing_can_be_measured_the_search_tells_why():
    class Starved(FakeDevice):
        def measure_many(self, models, *, seconds_each=0.02):
            raise PolicyFailure("the runtime crashed with SIGKILL")

    assert reference_for(Starved(), LIMIT_S, 32) == DEMO + "teacher"
