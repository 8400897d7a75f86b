"""The embedded demonstration from the command line to the shipped file, on the real device."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.cli import main
from autocompress.commands.deploy import recreate
from autocompress.controller.conclude import LEAST_TEST
from autocompress.data.sources import load_data
from autocompress.devices import open_device
from autocompress.export import Manifest
from autocompress.units import parse_duration

BUNDLE = {"model.onnx", "student.safetensors", "policy.json", "manifest.json"}
BUDGET_S = 10e-3
SEARCH_TIME, GOOD_ENOUGH = "180s", "0.9"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(run folder, finished process) of the README's first command, which ends here with the first policy that is good enough."""
    run = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "autocompress", "search", "--budget", "10ms", "--search-time", SEARCH_TIME, "--out", str(run)]
    command += ["--target-accuracy", GOOD_ENOUGH]
    return run, subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture(scope="session")
def shipped(demo, tmp_path_factory):
    """The bundle of the best policy, and what the command said of it."""
    folder = tmp_path_factory.mktemp("export") / "shipped"
    command = [sys.executable, "-m", "autocompress", "export", str(demo[0]), "--out", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, json.loads(done.stdout)


def answered(capsys, *arguments: str, code: int = 0) -> str:
    """What a command prints to stdout."""
    assert main(list(arguments)) == code
    return capsys.readouterr().out


def answered_json(capsys, *arguments: str) -> dict:
    content = json.loads(answered(capsys, *arguments, "--json"), parse_constant=pytest.fail)
    assert (content["schema"], content["ok"]) == (1, True)
    return content


@pytest.mark.slow
@pytest.mark.alone
def test_the_demonstration_finds_something_within_its_budget(demo):
    run, done = demo
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert str(run / "report.html") in done.stdout
    content = json.loads((run / "front.json").read_text(), parse_constant=pytest.fail)
    best = next(entry for entry in content["front"] if entry["id"] == content["best"])
    assert best["latency_s"]["high"] <= BUDGET_S < content["baseline"]["latency_s"]["median"] / 1.5, "the budget binds"
    assert best["val_score"]["value"] >= float(GOOD_ENOUGH)
    assert best["test_score"]["n"] >= LEAST_TEST
    assert content["elapsed_s"] <= 1.05 * parse_duration(SEARCH_TIME) + 5
    assert content["prediction"]["n"] >= 1


@pytest.mark.slow
def test_progress_comes_as_plain_lines_where_there_is_no_terminal(demo):
    told = demo[1].stderr
    assert "\x1b" not in told, "no control characters in a log"
    assert re.search(r"^\w.*; \d+ tried; best so far .+ at .+; .+ left$", told, re.MULTILINE), told
    for phase in ("measuring operators", "choosing first policies", "training the demonstration teacher", "scoring the original"):
        assert re.search(rf"^{phase}.*; .+ left$", told, re.MULTILINE), phase


@pytest.mark.slow
def test_show_and_explain(demo, capsys):
    run, _ = demo
    content = json.loads((run / "front.json").read_text())
    table = answered(capsys, "show", str(run))
    assert content["best"] in table
    assert re.search(r"times (faster than|the speed of) the original at .* within the budget \(latency 10 ms\)", " ".join(table.split()))
    assert answered_json(capsys, "show", str(run))["best"] == content["best"]
    layers = answered_json(capsys, "explain", str(run))
    assert layers["id"] == content["best"]
    assert any("head" in layer["name"] for layer in layers["layers"])
    for entry in content["points"]:
        assert entry["id"] in answered(capsys, "explain", str(run), entry["id"])


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.references += [value or "" for key, value in attributes if key in ("src", "href", "action", "poster", "data", "srcset")]


@pytest.mark.slow
def test_the_report_is_one_offline_file(demo, capsys):
    run, _ = demo
    (run / "report.html").unlink()
    (run / "pareto.png").unlink()
    told = answered_json(capsys, "report", str(run / "front.json"))  # the file of results means its folder
    text = Path(told["report"]).read_text(encoding="utf-8")
    assert not [reference for reference in _Page(text).references if not reference.startswith(("#", "data:"))]
    assert re.search(r"plotly\.js v\d", text)
    assert len(text) > 1_000_000, "plotly is inside"
    assert not re.search(r"url\(\s*['\"]?https?:", text)
    assert Path(told["pareto"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_export_writes_a_bundle_whose_manifest_says_what_was_measured(demo, shipped):
    folder, told = shipped
    assert {path.name for path in folder.iterdir()} == BUNDLE
    assert {Path(name).name for name in told["files"]} == BUNDLE
    content = json.loads((demo[0] / "front.json").read_text())
    best = next(entry for entry in content["points"] if entry["id"] == content["best"])
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    assert manifest.model_dump(mode="json", by_alias=True) == told["manifest"]
    assert manifest.policy_digest == best["digest"]
    assert manifest.size_bytes == best["size_bytes"] == (folder / "model.onnx").stat().st_size
    assert manifest.val_score.value == best["val_score"]["value"]
    assert manifest.test_score.value == best["test_score"]["value"]
    assert manifest.device == "onnxruntime:cpu?threads=1"
    assert manifest.latency_s.low <= manifest.latency_s.median <= manifest.latency_s.high
    assert manifest.latency_s.median == pytest.approx(best["latency_s"]["median"], rel=0.6), "the same file on the same machine"
    assert manifest.baseline_latency_s.median > 0
    assert told["within_budget"] is (manifest.latency_s.high <= BUDGET_S)


@pytest.mark.slow
def test_the_shipped_file_needs_nothing_but_onnx_runtime(shipped):
    folder, _ = shipped
    data = load_data("digits")
    np.save(folder.parent / "inputs.npy", data.test.inputs[:320].numpy())
    np.save(folder.parent / "targets.npy", data.test.targets[:320].numpy())
    program = f"""
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(folder / "model.onnx")!r}, providers=["CPUExecutionProvider"])
inputs, targets = (numpy.load(f"{folder.parent}/{{name}}.npy") for name in ("inputs", "targets"))
answers = numpy.concatenate([session.run(None, {{"x": inputs[i : i + 32]}})[0] for i in range(0, 320, 32)])
assert answers.shape == (320, 10) and numpy.isfinite(answers).all()
assert not {{"torch", "autocompress", "optuna"}} & set(sys.modules)
print((answers.argmax(1) == targets).mean())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    assert float(done.stdout) == pytest.approx(manifest.test_score.value, abs=0.05)


@pytest.mark.slow
def test_policy_and_teacher_make_the_same_student_again(shipped):
    import onnxruntime

    folder, _ = shipped
    student = recreate(folder)
    inputs = load_data("digits").val.inputs[:32]
    with torch.inference_mode():
        again = student(inputs).numpy()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    answers = session.run(None, {"x": inputs.numpy()})[0]
    assert (again.argmax(1) == answers.argmax(1)).mean() >= 31 / 32
    assert np.abs(again - answers).max() <= 0.05 * np.abs(answers).max(), "int8 arithmetic rounds; nothing else may differ"


@pytest.mark.slow
def test_an_export_replaces_an_export_and_nothing_else(demo, shipped, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.commands.deploy.EXPORT_MEASURE_S", 0.3)
    run, _ = demo
    folder, _ = shipped
    content = json.loads((run / "front.json").read_text())
    other = content["points"][0]["id"]
    told = answered_json(capsys, "export", str(run), "--out", str(tmp_path / "out"))
    assert told["manifest"]["policy_digest"] == Manifest.from_json((folder / "manifest.json").read_bytes()).policy_digest
    told = answered_json(capsys, "export", str(run), "--pick", other, "--out", str(tmp_path / "out"))
    assert told["manifest"]["policy_digest"] == content["points"][0]["digest"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    assert main(["export", str(run), "--out", str(tmp_path / "photos")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    assert main(["export", str(run), "--out", str(tmp_path / "photos" / "cat.jpg")]) == 2


@pytest.mark.slow
def test_a_file_is_measured_as_the_search_measured_it(shipped, capsys):
    told = answered_json(capsys, "measure", str(shipped[0] / "model.onnx"))
    latency = told["latency_s"]
    assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    assert latency["n"] >= 20


# -- without the demonstration's run ----------------------------------------------------------------------------------------


def test_one_policy_without_a_search(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.commands.apply.RANDOM_INPUTS", 8)
    options = ["--input", "3x64x64", "--policy", "random:1", "--out", str(tmp_path / "out")]
    told = answered_json(capsys, "apply", "torchvision:squeezenet1_1", *options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == BUNDLE
    manifest = Manifest.from_json((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.policy_digest == told["digest"]
    assert manifest.latency_s.median == told["latency_s"]
    assert manifest.val_score is None, "random inputs score nothing"
    assert told["speedup"] == pytest.approx(manifest.baseline_latency_s.median / manifest.latency_s.median)


def test_inspect(capsys):
    told = answered_json(capsys, "inspect", "torchvision:resnet18")
    assert len(told["layers"]) == 21
    assert len(told["blocks"]) >= 4
    assert told["input"] == "1x3x224x224"
    assert "layer1.0.conv1" in answered(capsys, "inspect", "torchvision:resnet18")


def test_a_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = answered_json(capsys, "search", "--budget", "10ms", "--batch-size", "64", "--dry-run")
    assert told["dimensions"] >= 3
    assert len(told["first_policies"]) == 3
    assert (told["task"]["batch"], told["task"]["batch_size"]) == (32, 64)
    assert not list(tmp_path.iterdir())


def test_devices_and_doctor(capsys):
    told = answered_json(capsys, "devices")
    assert any("onnxruntime:cpu" in json.dumps(device) for device in told["devices"])
    assert open_device("onnxruntime:cpu?threads=1").profile.threads == 1
    assert answered_json(capsys, "doctor")["usable"] is True
