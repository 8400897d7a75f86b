"""A network of several inputs, by place or by name: from data to the file that ships, and the commands that take no data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from tasks import CLASSES, SIZE, SLOW_CALLS, blobs
from torch import nn

from autocompress.batch import Batch, call_network
from autocompress.commands.apply import apply_policy
from autocompress.commands.deploy import recreate
from autocompress.commands.inspect import inspect_model
from autocompress.data import Data, Split
from autocompress.errors import UsageError
from autocompress.session import run_search
from autocompress.setup.loading import load
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice

SOURCE = """
from test_several_inputs import Fused
def build():
    return Fused()
"""


class Fused(nn.Module):
    """Images, the part of them that counts, and numbers that go with them; told apart by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, 1, 1)
        self.beside, self.head = nn.Linear(5, 16), nn.Linear(32, CLASSES)

    def forward(self, images: torch.Tensor, numbers: torch.Tensor, *, part: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        x = (x + torch.relu(self.inner(x))) * part[:, None]
        return self.head(torch.cat([x.mean((2, 3)), torch.relu(self.beside(numbers))], dim=1))


def examples(split: Split) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    part = torch.rand(len(split), SIZE, SIZE, generator=generator) > 0.2
    numbers = nn.functional.one_hot(split.targets, 5).double() + torch.randn(len(split), 5, generator=generator)
    return {"part": part, "images": split.inputs, "numbers": numbers}  # in another order than the network's


@pytest.fixture(scope="module")
def data():
    images = blobs()
    return Data(*(Split(examples(split), split.targets) for split in (images.train, images.val, images.test)), classes=CLASSES)


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    net = Fused()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        for inputs, targets in data.batches(data.train, 32):
            loss = nn.functional.cross_entropy(net(**dict(zip(inputs.names, inputs.tensors, strict=True))), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def test_a_search_ships_files_that_take_the_inputs_by_their_names(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.SHORT_RUNS", 30)
    monkeypatch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.2)
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.full_rung", lambda self: None)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = Task(model="own:fused", data="own:examples", search_time="60s", trials=1)
    result = run_search(task, tmp_path / "run", model=teacher, data=data, device=FakeDevice(SLOW_CALLS))
    assert result.content["failures"] == []
    assert result.content["baseline"]["test_score"]["value"] > 0.5
    (entry,) = [entry for entry in result.content["points"] if entry["rung"] == "short"]
    folder = tmp_path / "run" / "models" / entry["id"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(name, known["shape"], known["dtype"]) for name, known in manifest["inputs"].items()] == [
        ("part", [1, SIZE, SIZE], "bool"), ("images", [1, 3, SIZE, SIZE], "float32"), ("numbers", [1, 5], "float32"),
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["part", "images", "numbers"]
    one = data.prepare(data.test.rows(torch.tensor([3])))
    arrays = {name: tensor.numpy() for name, tensor in zip(one.names, one.tensors, strict=True)}
    student = recreate(folder, teacher)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, arrays)[0], call_network(student, one).numpy(), rtol=0.05, atol=0.05)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert "forward" not in vars(teacher), "the model that was given is never touched"


def test_inputs_that_the_network_does_not_know_are_refused(teacher, data):
    def renamed(split: Split) -> Split:
        return Split(dict(zip(("part", "images", "values"), split.inputs.tensors, strict=True)), split.targets)

    other = replace(data, **{name: renamed(getattr(data, name)) for name in ("train", "val", "test")})
    with pytest.raises(UsageError, match="has no 'values'") as error:
        load(Task(model="own:fused", data="own:examples"), model=teacher, data=other, device=FakeDevice())
    assert "images, numbers, part" in error.value.hint


def test_inputs_by_place_are_given_to_the_first_arguments(data, tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

        def forward(self, images: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.head(images.flatten(1) * scale)

    def with_scale(split: Split) -> Split:
        return Split((split.inputs.tensors[1], np.linspace(0.5, 1.5, len(split))[:, None]), split.targets)

    own = replace(data, **{name: with_scale(getattr(data, name)) for name in ("train", "val", "test")})
    loaded = load(Task(model="own:scaled", data="own:examples"), model=Scaled(), data=own, device=FakeDevice())
    assert isinstance(loaded.example, Batch)
    assert [layer.name for layer in loaded.graphs[None].layers] == ["head"]


def test_inputs_that_do_not_fit_are_told_with_all_shapes(teacher, data):
    unnamed = {name: Split(getattr(data, name).inputs.tensors, getattr(data, name).targets) for name in ("train", "val", "test")}
    with pytest.raises(UsageError, match=r"inputs of shape \(1, 8, 8\) and \(1, 3, 8, 8\) and \(1, 5\)"):
        load(Task(model="own:fused", data="own:examples"), model=teacher, data=replace(data, **unnamed), device=FakeDevice())


@pytest.fixture
def reference(tmp_path, monkeypatch):
    (tmp_path / "fused.py").write_text(SOURCE)
    return f"{tmp_path / 'fused.py'}:build"


SHAPES = f"part={SIZE}x{SIZE}:bool, images=3x{SIZE}x{SIZE}, numbers=5"


def test_commands_without_data_are_told_the_shapes(reference, tmp_path):
    found = inspect_model(reference, input=SHAPES)
    assert found["input"] == f"1x{SIZE}x{SIZE}, 1x3x{SIZE}x{SIZE}, 1x5"
    assert found["weights_that_pruning_reaches"] == "100.0 %"
    told = apply_policy(reference, policy="random:1", out=tmp_path / "out", input=SHAPES)
    assert told["largest_difference"] < 0.2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [*manifest["inputs"]] == ["part", "images", "numbers"]
    with pytest.raises(UsageError, match="must all be named"):
        inspect_model(reference, input=SHAPES.replace("numbers=", ""))
