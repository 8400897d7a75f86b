"""A model, images and a task of one's own: from files to a shipped file, on the real device; and students of another architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tasks import SLOW_CALLS

from autocompress.cli import main
from autocompress.commands.deploy import recreate
from autocompress.session import run_search
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice

SOURCE = """
from torch import nn
def build():
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3))
"""
OTHER = """
from torch import nn
def build():
    first = [nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()]
    then = [nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.Conv2d(24, 48, 1), nn.ReLU()]
    return nn.Sequential(*first, *then, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))
"""
TASK = """
model = "${HERE}/own.py:build"
data = "imagefolder:${HERE}/photos?size=16"
search_time = "60s"
trials = 1
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a model, a task, and photos of three kinds."""
    generator = np.random.default_rng(0)
    for label, kind in enumerate(("cat", "dog", "newt")):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(24):
            image = generator.integers(0, 80, (20, 24, 3), dtype=np.uint8)
            image[..., label] += 120
            Image.fromarray(image).save(tmp_path / "photos" / kind / f"{number}.png")
    (tmp_path / "own.py").write_text(SOURCE)
    (tmp_path / "task.toml").write_text(TASK)
    return tmp_path


@pytest.mark.slow
def test_a_task_file_with_a_model_and_photos_of_ones_own(place, capsys, monkeypatch):
    import onnxruntime

    monkeypatch.setattr("autocompress.schedule.SHORT_RUNS", 30)
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.full_rung", lambda self: None)
    monkeypatch.setattr("autocompress.candidates.ahead.WHOLE_NETWORKS", 2)
    monkeypatch.setattr("autocompress.controller.conclude.FINAL_SECONDS_EACH", 0.3)
    monkeypatch.setattr("autocompress.commands.deploy.EXPORT_MEASURE_S", 0.3)
    run, out = place / "run", place / "shipped"
    assert main(["search", str(place / "task.toml"), "--quiet", "--out", str(run)]) == 0
    assert main(["export", str(run), "--pick", "int8", "--out", str(out), "--json"]) == 0
    capsys.readouterr()
    content = json.loads((run / "front.json").read_text())
    assert content["failures"] == []
    assert {entry["id"].removesuffix("-full") for entry in content["points"]} == {"int8", "00000"}
    assert content["baseline"]["test_score"]["n"] >= 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["class_names"] == ["cat", "dog", "newt"]
    normalisation = manifest["normalisation"]
    assert [normalisation["mean"], normalisation["std"]] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], "what `imagefolder` takes"
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 3, 16, 16), dtype=np.float32)})
    assert answers.shape == (1, 3)


def test_students_of_another_architecture_are_searched_and_made_again(net, data, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.SHORT_RUNS", 30)
    monkeypatch.setattr("autocompress.candidates.ahead.WHOLE_NETWORKS", 2)
    monkeypatch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.2)
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.full_rung", lambda self: None)
    (tmp_path / "other.py").write_text(OTHER)
    reference = f"{tmp_path / 'other.py'}:build"
    task = Task(model="own:net", data="own:blobs", student=reference, search_time="90s", trials=1)
    result = run_search(task, tmp_path / "run", model=net, data=data, device=FakeDevice(SLOW_CALLS))
    (entry,) = [entry for entry in result.content["points"] if entry["rung"] == "short"]
    assert entry["policy"]["student"]["reference"] == reference
    assert entry["latency_s"]["median"] > 0
    assert result.content["ladder"]["foreseen_appraised_spearman"] is None, "a promise that agrees with itself says nothing"
    student = recreate(tmp_path / "run" / "models" / entry["id"], student=reference)
    assert student(data.val.inputs[:4]).shape == (4, data.classes)
