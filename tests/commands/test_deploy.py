from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autocompress
from autocompress.cli import main
from autocompress.commands import deploy
from autocompress.commands.apply import apply_policy
from autocompress.commands.deploy import export_run, recreate
from autocompress.commands.measure import measure_on
from autocompress.compress.student import build_student
from autocompress.data import Data, Split
from autocompress.errors import PolicyFailure, RunFolderError, UsageError
from autocompress.export import Provenance, read_manifest, update_manifest, write_bundle
from autocompress.graph import Graph
from autocompress.policy import Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.setup.loading import load
from autocompress.system.run_folder import remember_own
from autocompress.task import TASK_FILE, Task
from autocompress.testing.devices import FakeDevice
from autocompress.testing.models import tiny_resnet
from autocompress.trial.preparation import prepare

MODEL = "autocompress.testing.models:tiny_resnet"
EXAMPLE = (torch.randn(1, 3, 16, 16),)


def answers(path, inputs):
    return torch.from_numpy(FakeDevice().run(path, [(inputs.numpy(),)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder with a baseline and one policy that is written as a search writes it."""
    run = tmp_path_factory.mktemp("made")
    teacher = tiny_resnet()
    save_file({key: value.contiguous() for key, value in teacher.state_dict().items()}, run / "teacher.safetensors")
    graph = Graph.trace(teacher.eval(), EXAMPLE)
    streams = [group.name for group in graph.groups if group.prunable and group.stream]
    policy = Policy(prune=PruneSpec(ratios=dict.fromkeys(streams, 0.5)))
    for name, chosen in (("baseline", Policy()), ("00000", policy)):
        write_bundle(run / "models" / name, build_student(graph, chosen).eval(), chosen, *EXAMPLE, Provenance(model=MODEL, classes=10))
    device = FakeDevice()
    before, after = device.measure([run / "models" / name / "model.onnx" for name in ("baseline", "00000")])
    entry = {
        "id": "00000", "digest": policy.digest, "policy": policy.model_dump(mode="json", by_alias=True), "speedup": 1.5, "feasible": True,
        "val_score": {"value": 0.5}, "latency_s": after.model_dump(mode="json"), "artifact": "models/00000/model.onnx",
        "size_bytes": (run / "models" / "00000" / "model.onnx").stat().st_size,
    }  # fmt: skip
    baseline = {"latency_s": before.model_dump(mode="json"), "size_bytes": 9, "artifact": "models/baseline/model.onnx"}
    content = {"schema": 1, "device": "fake", "budget": {}, "baseline": baseline, "front": [entry], "points": [entry], "best": "00000"}
    (run / "front.json").write_text(json.dumps(content))
    return run


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr("autocompress.commands.apply.RANDOM_INPUTS", 8)  # of 224 x 224 pixels
    for module in ("commands.deploy", "commands.measure", "setup.loading"):
        monkeypatch.setattr(f"autocompress.{module}.open_device", lambda name: FakeDevice())


@pytest.fixture
def run(made, tmp_path):
    import shutil

    return shutil.copytree(made, tmp_path / "run")


def change(run, **changes):
    content = json.loads((run / "front.json").read_text())
    content["points"][0] |= changes
    (run / "front.json").write_text(json.dumps(content))


def test_an_export_holds_the_bundle_and_fresh_measurements(run, tmp_path):
    exported = export_run(run, out=tmp_path / "new" / "out")
    assert {path.name for path in exported.folder.iterdir()} == set(deploy.BUNDLE)
    assert exported.manifest == read_manifest(exported.folder)
    assert exported.manifest.latency_s.median < exported.manifest.baseline_latency_s.median
    assert exported.within_budget
    assert not read_manifest(run / "models" / "00000").latency_s, "the run's own bundle stays as it was"


def test_what_was_predicted_of_another_device_is_not_said_of_this_one(run, tmp_path, monkeypatch):
    change(run, predicted_latency_s={"value": 1.0, "low": 0.5, "high": 2.0})
    assert export_run(run, out=tmp_path / "out").manifest.predicted_latency_s.value == 1.0

    def named(name):
        device = FakeDevice()
        device.name = name
        return device

    monkeypatch.setattr("autocompress.commands.deploy.open_device", named)
    exported = export_run(run, out=tmp_path / "out", device="fake-2").manifest
    assert (exported.device, exported.scored_on, exported.predicted_latency_s) == ("fake-2", "fake", None)


def test_a_bundle_that_lacks_a_file_is_refused(run, tmp_path):
    out = export_run(run, out=tmp_path / "out").folder
    (out / "policy.json").unlink()
    with pytest.raises(RunFolderError, match=r"policy\.json.* is missing"):
        recreate(out, MODEL)


def test_a_policy_is_picked_by_the_first_digits_of_its_digest(run, tmp_path):
    digest = json.loads((run / "front.json").read_text())["points"][0]["digest"]
    assert export_run(run, pick=digest[:8], out=tmp_path / "out").manifest.policy_digest == digest


def test_over_the_budget_is_said(run, tmp_path):
    content = json.loads((run / "front.json").read_text())
    (run / "front.json").write_text(json.dumps(content | {"budget": {"latency_s": 1e-9}}))
    assert not export_run(run, pick="00000", out=tmp_path / "out").within_budget


def test_a_relative_budget_is_of_the_original_as_it_is_measured_now(run, tmp_path):
    """The seconds of the search are of another minute, perhaps of another machine."""
    content = json.loads((run / "front.json").read_text())
    for asked, within in (("1.1x", True), ("0.01x", False)):
        (run / "front.json").write_text(json.dumps(content | {"task": {"budget": [asked]}, "budget": {"latency_s": 1e-9}}))
        assert export_run(run, pick="00000", out=tmp_path / "out").within_budget is within


def test_a_torch_program_computes_the_same(run, tmp_path):
    out = export_run(run, out=tmp_path / "out", formats=("onnx", "torch"), model=MODEL).folder
    program = torch.export.load(out / "model.pt2").module()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program(x), answers(out / "model.onnx", x), rtol=1e-4, atol=1e-5)


def test_a_student_of_another_teacher_is_not_passed_off_as_the_same(run, tmp_path):
    """Zero-padded shortcuts: which channels stay depends on the teacher's weights."""
    from autocompress.testing.models import tiny_resnet

    refused = 0
    for seed in range(4):
        torch.manual_seed(100 + seed)
        other = tiny_resnet().eval()
        try:
            out = export_run(run, out=tmp_path / f"out{seed}", formats=("onnx", "torch"), model=other).folder
        except UsageError as error:
            assert "must answer as the file does" in error.message
            refused += 1
            continue
        x = torch.randn(1, 3, 16, 16)
        program = torch.export.load(out / "model.pt2").module()
        torch.testing.assert_close(program(x).detach(), answers(out / "model.onnx", x), rtol=1e-4, atol=1e-5)
    assert refused


def test_an_export_leaves_no_other_policys_formats(run, tmp_path):
    out = export_run(run, out=tmp_path / "out").folder
    for name in ("model.xml", "model.bin", "model.pt2"):
        (out / name).write_text("of an earlier export")
    export_run(run, out=out)
    assert {path.name for path in out.iterdir()} == set(deploy.BUNDLE)


def test_a_manifest_of_something_else_is_no_earlier_export(run, tmp_path):
    for name, content in (("manifest.json", '{"name": "a web page"}'), ("model.onnx", "mine")):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / name).write_text(content)
    export_run(run, out=tmp_path / "exported")
    (tmp_path / "exported" / "thesis.tex").write_text("mine")
    for folder in ("site", "exported"):
        before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        with pytest.raises(UsageError, match="holds other files"):
            export_run(run, out=tmp_path / folder)
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before


def test_an_export_never_lies_among_the_models_of_a_run(run):
    with pytest.raises(UsageError, match="among the models of the run"):
        export_run(run, out=run / "models" / "baseline")


def test_an_export_that_fails_leaves_the_earlier_one_or_nothing(run, tmp_path):
    from autocompress.testing.models import resnet20

    export_run(run, out=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for out in (tmp_path / "out", tmp_path / "fresh"):
        with pytest.raises(UsageError, match="do not fit the student of this teacher"):
            export_run(run, out=out, formats=("onnx", "torch"), model=resnet20())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "fresh").exists()


def test_a_policy_can_be_drawn_for_another_architecture(tmp_path):
    reference = "autocompress.testing.models:resnet20"
    apply_policy(MODEL, policy="random:1", student=reference, out=tmp_path / "out")
    assert Policy.from_json((tmp_path / "out" / "policy.json").read_bytes()).student.reference == reference


@pytest.mark.parametrize("artifact", ["../../etc/passwd", "/etc/passwd", None])
def test_a_run_folder_never_leads_outside_of_itself(run, tmp_path, artifact):
    change(run, artifact=artifact)
    with pytest.raises(RunFolderError, match="must name a file inside"):
        export_run(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_deleted_and_a_damaged_artifact_are_named(run, tmp_path):
    path = run / "models" / "00000" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="is not the file that was measured"):
        export_run(run, out=tmp_path / "out")
    path.unlink()
    with pytest.raises(RunFolderError, match="was deleted"):
        export_run(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_baseline_that_is_gone_is_named(run, tmp_path):
    (run / "models" / "baseline" / "model.onnx").unlink()
    with pytest.raises(RunFolderError, match="the baseline's file"):
        export_run(run, out=tmp_path / "out")


def test_code_that_a_folder_names_is_not_run(run):
    bundle = run / "models" / "00000"
    update_manifest(bundle, {"model": "evil.py:build"})
    with pytest.raises(UsageError, match="code that this command does not run") as caught:
        recreate(bundle)
    assert "--model" in caught.value.hint


def test_code_that_a_policy_file_names_is_not_run(tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(Policy(student=StudentSpec(reference="evil.py:build")).to_json().encode())
    with pytest.raises(UsageError, match="code that this command does not run"):
        apply_policy(MODEL, policy=str(path), out=tmp_path / "out")


def test_a_student_of_another_architecture_is_not_the_given_teacher(run):
    bundle = run / "models" / "00000"
    (bundle / "policy.json").write_bytes(Policy(student=StudentSpec(reference="evil.py:build")).to_json().encode())
    with pytest.raises(UsageError, match="code that this command does not run"):
        recreate(bundle, MODEL)


def test_a_student_of_another_architecture_is_made_again_as_it_was(tmp_path):
    """It has no weights of its own before it is trained: which channels were kept follows from the seed."""
    reference = "autocompress.testing.models:resnet20"
    images = Split(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    task = Task(model=MODEL, data="own:images", student=reference, seed=7)
    setting = prepare(task, tmp_path / "run", load(task, data=Data(images, images, images, classes=10), device=FakeDevice()))
    streams = [group.name for group in setting.graphs[reference].groups if group.prunable and group.stream]
    policy = Policy(student=StudentSpec(reference=reference), prune=PruneSpec(ratios=dict.fromkeys(streams, 0.5)))
    student = build_student(setting.graph_of(policy), policy)
    setting.write(tmp_path / "bundle", student, policy)
    again = recreate(tmp_path / "bundle")
    assert torch.equal(again(images.inputs), student(images.inputs))
    update_manifest(tmp_path / "bundle", {"seed": 8})
    with pytest.raises(UsageError, match="must answer as the file does"):
        recreate(tmp_path / "bundle")
    with pytest.raises(UsageError, match="code that this command does not run"):
        recreate_from(tmp_path / "bundle", "own.py:net")


def recreate_from(bundle, reference):
    """With the policy changed to name a user's function."""
    (bundle / "policy.json").write_bytes(Policy(student=StudentSpec(reference=reference)).to_json().encode())
    return recreate(bundle, student="other.py:net")


def test_a_student_of_a_model_that_was_an_object_needs_the_object(run):
    bundle = run / "models" / "00000"
    update_manifest(bundle, {"model": "python:Net"})
    with pytest.raises(UsageError, match=r"an object of Python \(Net\)") as caught:
        recreate(bundle)
    assert "recreate(folder, model)" in caught.value.hint


def test_a_student_is_made_again_from_a_module(run):
    from autocompress.testing.models import tiny_resnet

    teacher = tiny_resnet()
    teacher.load_state_dict(load_file(run / "teacher.safetensors"))
    student = autocompress.recreate(str(run / "models" / "00000"), teacher)
    assert isinstance(student, nn.Module)
    assert not student.training


def test_the_teachers_weights_are_those_that_are_named(run):
    bundle = run / "models" / "00000"
    assert isinstance(autocompress.recreate(bundle, MODEL, weights=str(run / "teacher.safetensors")), nn.Module)
    with pytest.raises(UsageError, match="does not exist"):
        autocompress.recreate(bundle, MODEL, weights=run / "teacher.safetensor")


@pytest.mark.parametrize("formats", [("onnx", "openvno"), (), "openvno"], ids=["mistyped", "none", "a string"])
def test_formats_are_checked_from_python_too(run, tmp_path, formats):
    with pytest.raises(UsageError, match="must be some of onnx, openvino, torch"):
        export_run(run, out=tmp_path / "out", formats=formats)
    assert not (tmp_path / "out").exists()


def test_one_format_needs_no_list(run, tmp_path):
    assert (export_run(run, out=tmp_path / "out", formats="onnx").folder / "model.onnx").is_file()


def test_what_a_format_cannot_hold_is_told_as_such(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no rule for aten.frobnicate")

    monkeypatch.setattr("torch.export.save", fail)
    with pytest.raises(UsageError, match=r"policy 00000 cannot be written for torch: RuntimeError: no rule for aten\.frobnicate"):
        export_run(run, out=tmp_path / "out", formats="torch", model=MODEL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["student.safetensors", "policy.json", "model.onnx", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_no_damaged_bundle_is_exported(run, tmp_path, name, damage):
    path = run / "models" / "00000" / name
    path.write_bytes(path.read_bytes()[:-5]) if damage == "cut" else path.unlink()
    with pytest.raises(RunFolderError, match=name.replace(".", r"\.")):
        export_run(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_cut_off_are_named(run):
    path = run / "models" / "00000" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunFolderError, match="cannot be read: SafetensorError"):
        recreate(run / "models" / "00000", MODEL, weights=run / "teacher.safetensors")


class Words(nn.Module):
    """Whole numbers in, classes out."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 16), nn.Linear(16, 3)

    def forward(self, words):
        return self.head(self.table(words).mean(1))


def test_a_model_of_whole_numbers_is_made_again(tmp_path):
    words = torch.randint(0, 7, (4, 5))
    teacher = Words().eval()
    student = build_student(Graph.trace(teacher, (words,)), Policy())
    manifest = write_bundle(tmp_path, student.eval(), Policy(), words, Provenance(model="own:words"))
    assert [(known.shape, known.dtype) for known in manifest.inputs.values()] == [((4, 5), "int64")]
    torch.testing.assert_close(recreate(tmp_path, teacher)(words), teacher(words))


@pytest.mark.parametrize(
    ("policy", "message"),
    [("absent.json", "cannot be read"), ("random:x", "whole number")],
)
def test_policies_that_cannot_be_had(tmp_path, policy, message):
    with pytest.raises(UsageError, match=message):
        apply_policy(MODEL, policy=policy, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


SPLITS = """
import torch
def splits(): return [(torch.randn(32, 3, 16, 16), torch.arange(32) % 10)] * 3
"""


@pytest.mark.parametrize("saturates", [False, True])
def test_a_policy_file_is_applied_to_data_in_a_range_that_the_device_does_not_saturate(tmp_path, monkeypatch, saturates):
    device = FakeDevice()
    device.profile = device.profile.model_copy(update={"reduced_range": saturates or device.profile.reduced_range})
    monkeypatch.setattr("autocompress.setup.loading.open_device", lambda name: device)
    (tmp_path / "own.py").write_text(SPLITS)
    (tmp_path / "policy.json").write_text(Policy(quant={"bits": 8}).to_json())
    policy = Policy(quant=QuantSpec(bits=8, reduced_range=device.profile.reduced_range))
    told = apply_policy(MODEL, policy=str(tmp_path / "policy.json"), data=f"{tmp_path / 'own.py'}:splits", out=tmp_path / "out", batch=8)
    assert told["digest"] == policy.digest
    assert told["speedup"] > 1
    assert read_manifest(tmp_path / "out").val_score.n == 32


def test_a_module_a_policy_and_data_may_be_objects(tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.setup.loading.open_device", lambda name: FakeDevice())
    model, inputs = tiny_resnet(), torch.randn(32, *EXAMPLE[0].shape[1:])
    before, splits = copy.deepcopy(model.state_dict()), [(inputs, torch.arange(32) % 10)] * 3
    told = apply_policy(model, policy=Policy(quant=QuantSpec(bits=8)), data=splits, out=tmp_path / "out")
    assert told["policy"].startswith("int8") and read_manifest(tmp_path / "out").val_score.n == 32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert apply_policy(model, policy="random:1", input="x".join(map(str, EXAMPLE[0].shape[1:])), out=tmp_path / "drawn")["folder"]


def test_of_many_examples_a_part_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.setup.loading.open_device", lambda name: FakeDevice())
    monkeypatch.setattr("autocompress.commands.apply.MOST_VALIDATION_S", 0.0)
    monkeypatch.setattr("autocompress.trial.preparation.FEWEST_EXAMPLES", 8)
    (tmp_path / "own.py").write_text(SPLITS)
    told = apply_policy(MODEL, policy="random:1", data=f"{tmp_path / 'own.py'}:splits", out=tmp_path / "out", batch=8)
    assert read_manifest(tmp_path / "out").val_score.n == 8
    assert "of 8 examples" in told["validation"]


@pytest.mark.parametrize("place", ["file/out", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_written_is_named(run, tmp_path, monkeypatch, place):
    monkeypatch.chdir(run)
    (run / "file").write_text("")
    with pytest.raises((UsageError, RunFolderError), match="cannot be written"):
        export_run(run, out=Path(place))
    with pytest.raises((UsageError, RunFolderError), match="cannot be written"):
        apply_policy(MODEL, policy="random:1", out=Path(place))


def failing_at(monkeypatch, call):
    """One device for all, whose call of that number fails."""
    device = FakeDevice(failures={call: PolicyFailure("the runtime crashed with SIGSEGV")})
    for module in ("commands.deploy", "commands.measure", "setup.loading"):
        monkeypatch.setattr(f"autocompress.{module}.open_device", lambda name: device)


def test_what_the_device_cannot_run_is_no_bug(run, tmp_path, monkeypatch, capsys):
    failing_at(monkeypatch, 0)
    assert main(["measure", str(run / "models" / "00000" / "model.onnx")]) == 2
    assert "cannot be measured: the runtime crashed with SIGSEGV" in capsys.readouterr().err
    failing_at(monkeypatch, 0)
    with pytest.raises(UsageError, match="policy 00000 cannot be measured on fake: the runtime crashed"):
        export_run(run, out=tmp_path / "out")
    failing_at(monkeypatch, 1)
    with pytest.raises(UsageError, match="'random:1' cannot become a file that runs: the runtime crashed"):
        apply_policy(MODEL, policy="random:1", out=tmp_path / "applied")


def test_a_model_is_measured_as_an_object_too():
    model = tiny_resnet()
    assert autocompress.measure_model(model, device="fake", input="3x16x16", batch=2).median > 0
    assert model.training, "and never changed"


def test_a_model_is_measured_by_its_reference():
    assert all(found.median > 0 for found in measure_on(MODEL, ["fake", "fake"]))


def test_what_a_killed_export_left_is_no_hindrance(run, tmp_path):
    out = tmp_path / "out"
    (out / ".export-killed").mkdir(parents=True)
    (out / ".export-killed" / "model.onnx").write_bytes(b"half")
    os.utime(out / ".export-killed", (1.0, 1.0))
    exported = export_run(run, out=out)
    assert {path.name for path in exported.folder.iterdir()} == {"model.onnx", "student.safetensors", "policy.json", "manifest.json"}


def test_an_export_that_is_killed_between_two_files_is_told_by_its_manifest(run, tmp_path, monkeypatch):
    export_run(run, out=tmp_path / "out")
    moved = Path.replace

    def killed(path, target):
        if target.name == "manifest.json" and target.parent == tmp_path / "out":
            raise KeyboardInterrupt
        return moved(path, target)

    (tmp_path / "out" / "model.onnx").write_bytes(b"of another policy")
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, out=tmp_path / "out")
    assert read_manifest(tmp_path / "out"), "the last file that is replaced"


def test_paths_may_be_text(run, tmp_path):
    assert autocompress.measure_model(str(run / "models" / "00000" / "model.onnx")).median > 0
    with pytest.raises(UsageError, match="does not exist"):
        autocompress.inspect_model(MODEL, weights=str(tmp_path / "absent.pt"))
    with pytest.raises(UsageError, match="cannot be read"):
        autocompress.apply_policy(MODEL, policy=tmp_path / "absent.json", out=str(tmp_path / "out"))


def test_a_device_elsewhere_is_not_asked_because_a_folder_of_somebody_else_names_it(run, tmp_path):
    """It would be sent the token."""
    content = json.loads((run / "front.json").read_text()) | {"device": "agent://elsewhere:7878?runtime=onnxruntime&threads=1"}
    (run / "front.json").write_text(json.dumps(content))
    task = Task(device="agent://elsewhere")
    (run / TASK_FILE).write_text(task.to_toml())
    with pytest.raises(UsageError, match="no search of yours on this machine") as caught:
        export_run(run, out=tmp_path / "out")
    assert "--device" in caught.value.hint
    assert not (tmp_path / "out").exists()
    elsewhere = export_run(run, out=tmp_path / "out", device="onnxruntime:cpu").manifest
    assert elsewhere.latency_s is not None
    assert (elsewhere.device, elsewhere.scored_on) == (FakeDevice().name, content["device"])
    remember_own(run / TASK_FILE)
    assert export_run(run, out=tmp_path / "out").manifest.latency_s is not None
    (run / "front.json").write_text(json.dumps(content | {"device": "agent://somewhere:7878"}))
    with pytest.raises(UsageError, match="agent://somewhere"):
        export_run(run, out=tmp_path / "out")
