"""From a user's module and data to a setting: what is copied, what is refused, what one policy's failure is."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from running import INT8, TASK, ready
from tasks import CLASSES, SLOW_CALLS, Net, blobs
from torch import nn

from autocompress.data import Data, Split
from autocompress.demo import TEACHER_EPOCHS
from autocompress.errors import DeviceUnavailable, UsageError
from autocompress.export import read_manifest
from autocompress.policy import Policy
from autocompress.records import Attempt
from autocompress.setup.loading import load, open_weights
from autocompress.setup.setting import MOST_ANSWER_BYTES
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice
from autocompress.trial.objective import evaluate_policy
from autocompress.trial.preparation import limit_validation, prepare, score_baseline, train_demo_teacher


def test_a_module_in_training_mode_is_copied_and_left_as_it_is(net, data, tmp_path):
    own = copy.deepcopy(net).train()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    setting = ready(own, data, tmp_path / "run")
    indices = torch.arange(32)
    inputs = data.view(indices, 0)
    answers = setting.teacher.answers(indices, inputs, 0)
    with torch.no_grad():
        assert torch.allclose(answers.outputs, copy.deepcopy(own).eval()(inputs), atol=0.1), "running statistics, not the batch's"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in setting.teacher.model.modules()), "they are folded"
    assert own.training
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


@pytest.mark.parametrize(
    "outputs", [lambda y: (y, y), lambda y: {"boxes": y, "kinds": y}, lambda y: y.sum()], ids=["tuple", "dict", "scalar"]
)
def test_a_model_must_return_one_tensor_with_a_row_an_input(data, tmp_path, outputs):
    class Several(Net):
        def forward(self, x):
            return outputs(super().forward(x))

    own = replace(data, classes=None, loss=lambda a, b: a.sum(), score=lambda a, b: 0.0)
    with pytest.raises(UsageError, match="one tensor with a row for each input"):
        ready(Several().eval(), own, tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda a, b: nn.functional.cross_entropy(a, b.long()), "must take outputs of shape (32, 4) and targets of shape (32, 4)"),
        (lambda a, b: (a - b).square(), "but raised"),
        (lambda a, b: torch.tensor(1.0), "but raised"),
        (lambda a, b: (a - b).square().mean() / 0.0, "must be finite, but is inf"),
    ],
    ids=["shapes", "no number", "no gradient", "infinite"],
)
def test_a_loss_of_ones_own_is_tried_before_the_search(data, tmp_path, loss, complaint):
    """A search calls it for the first time after a third of its time."""
    splits = [
        Split(part.inputs, torch.arange(4.0 * len(part), dtype=torch.float64).view(-1, 4)) for part in (data.train, data.val, data.test)
    ]
    own = Data(*splits, loss=loss, score=lambda a, b: 0.0)
    assert own.train.targets.dtype == torch.float32, "as outputs are"
    with pytest.raises(UsageError, match="the data's loss") as caught:
        ready(Net().eval(), own, tmp_path / "run")
    assert complaint in caught.value.message
    fine = replace(own, loss=nn.functional.mse_loss)
    ready(Net().eval(), fine, tmp_path / "run")


def test_weights_that_are_not_numbers_are_the_models_fault(net, data, tmp_path):
    broken = copy.deepcopy(net)
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(UsageError, match=r"own:net must run on the device as it is.*finite"):
        score_baseline(ready(broken, data, tmp_path / "run"), data.val)


def test_a_device_that_cannot_run_the_original_says_so(net, data, tmp_path):
    with pytest.raises(UsageError, match="own:net must run on the device as it is"):
        ready(net, data, tmp_path / "run", FakeDevice(failures={0: ValueError("no such operator")}))
    with pytest.raises(DeviceUnavailable):
        ready(net, data, tmp_path / "run", FakeDevice(failures={0: DeviceUnavailable("gone")}))


@pytest.mark.parametrize(("governor", "told"), [("powersave", True), ("performance", False), ("unknown", False), (None, False)])
def test_a_clock_that_follows_the_load_is_told(net, data, monkeypatch, governor, told):
    monkeypatch.setattr(FakeDevice, "environment", lambda self: {"governor": governor} if governor else {})
    notes = load(TASK, model=net, data=data, device=FakeDevice()).notes
    assert any("'performance'" in note for note in notes) is told


class Exits(Net):
    """Has another head for what is out of the ordinary."""

    def __init__(self):
        super().__init__()
        self.early = nn.Linear(3, CLASSES)

    def forward(self, x):
        if x.abs().max() > 1e4:
            return self.early(x.mean((2, 3)))
        return super().forward(x)


def test_a_network_that_seldom_takes_another_exit_can_be_asked(tmp_path):
    data = blobs()
    data.train.inputs[200:] *= 1e6
    setting = ready(Exits().eval(), data, tmp_path / "run")
    assert "depends on the data" in setting.graphs[None].frozen[0].reason
    setting.teacher.prepare(60.0)
    answers = setting.teacher.answers(torch.arange(190, 210), data.view(torch.arange(190, 210), 0, 0), 0)
    assert answers.outputs.shape == (20, CLASSES)


def test_the_demonstrations_teacher_is_trained_whatever_the_batch_of_students(net, data, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr("autocompress.trial.preparation.train", lambda model, data, plan, tick: plans.append(plan))
    setting = replace(ready(net, data, tmp_path / "run"), batch_size=4096)
    train_demo_teacher(setting, tmp_path, 60.0, lambda _: None)
    assert plans[0].steps >= TEACHER_EPOCHS
    assert plans[0].batch_size < len(data.train)


def test_a_target_is_a_share_unless_the_data_has_its_own_score(net, data, tmp_path):
    own = replace(data, loss=nn.functional.cross_entropy, score=lambda outputs, targets: -1.0)
    for target in (-0.5, 0.0, 40.0):
        wanted = TASK.model_copy(update={"target_accuracy": target})
        with pytest.raises(UsageError, match=r"target_accuracy must lie in \(0, 1\]"):
            load(wanted, model=net, data=data, device=FakeDevice())
        assert load(wanted, model=net, data=own, device=FakeDevice()).data is own


def test_validation_is_cut_to_the_time_that_there_is_and_the_cut_is_kept(net, data, tmp_path):
    many = replace(data, val=Split(data.train.inputs.repeat(8, 1, 1, 1), data.train.targets.repeat(8)))
    setting = ready(net, many, tmp_path / "run")
    assert limit_validation(setting, seconds=1e6).data.val is many.val
    call = setting.baseline.latency_s.median
    assert len(limit_validation(setting, seconds=300.5 * call).data.val) == 300
    short = limit_validation(setting, seconds=100 * call).data.val
    assert len(short) == 256, "with fewer there is little to tell policies apart by"
    assert len(limit_validation(setting, seconds=10.1 * call).data.val) == 50, "unless the model is slow"
    assert len(limit_validation(setting, seconds=call).data.val) == 32
    again = limit_validation(setting, seconds=1e6, examples=len(short)).data.val
    assert torch.equal(again.inputs, short.inputs)


def test_answers_that_are_maps_are_held_of_fewer_examples(net, data, tmp_path, monkeypatch):
    setting = ready(net, data, tmp_path / "run")
    assert setting.most_answers == MOST_ANSWER_BYTES // (4 * 4), "four classes"
    monkeypatch.setattr("autocompress.setup.setting.MOST_ANSWER_BYTES", 40 * 4 * 4)
    few = limit_validation(replace(setting), seconds=1e6)
    assert len(few.data.val) == few.most_answers == 40
    assert evaluate_policy(few, Attempt(id="00000", policy=INT8, rung="short"), seconds=0.0).failure is None


def test_a_network_in_half_precision_is_compressed_from_float32_and_stays_as_it_is(net, data, tmp_path):
    own = copy.deepcopy(net).half()
    setting = ready(own, data, tmp_path / "run")
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float16}
    assert evaluate_policy(setting, Attempt(id="00000", policy=Policy(), rung="short"), seconds=0.0).failure is None


def test_a_network_of_eight_bits_is_refused(net, data, tmp_path):
    own = copy.deepcopy(net)
    own.head.weight = nn.Parameter(own.head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match="must be float32") as caught:
        ready(own, data, tmp_path / "run")
    assert "model.float()" in caught.value.hint


def test_the_same_random_network_in_every_process(tmp_path):
    """A student's architecture has no weights; which channels it keeps must not change on --resume."""
    inputs = torch.randn(40, 3, 32, 32)
    data = Data(*(Split(inputs, torch.arange(40) % 10) for _ in range(3)), classes=10)
    task = Task(model="torchvision:resnet18", data="own:blobs", student="torchvision:shufflenet_v2_x0_5", seed=3)
    states = []
    for attempt in range(2):
        torch.manual_seed(attempt)
        setting = prepare(task, tmp_path / f"run{attempt}", load(task, data=data, device=FakeDevice(SLOW_CALLS)))
        states.append(setting.graphs[task.student].module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_network_that_was_quantized_already_is_refused(data, tmp_path):
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    packed = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UsageError, match="must be in floating point, but 1 of own:net is quantized"):
        ready(packed, data, tmp_path / "run")


def test_a_model_of_python_gets_the_weights_that_are_named(data, tmp_path):
    torch.manual_seed(1)
    given, weights = Net(), tmp_path / "weights.pt"
    other = {name: torch.zeros_like(value) for name, value in given.state_dict().items()}
    torch.save(other, weights)
    loaded = load(TASK.model_copy(update={"weights": str(weights)}), model=given, data=data, device=FakeDevice(SLOW_CALLS))
    assert all(torch.equal(value, other[name]) for name, value in loaded.teacher.state_dict().items())
    assert given.head.weight.abs().sum() > 0, "and stays as it is"


def test_what_a_killed_search_left_behind_is_removed(net, data, tmp_path):
    left = tmp_path / "run" / "models" / "untrained-abc"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"")
    ready(net, data, tmp_path / "run")
    assert not left.exists()


class Moody(Net):
    """Answers something else each time."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Blind(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(("kind", "says"), [(Moody, "float32 outputs must agree"), (Blind, "its own outputs are not finite")])
def test_the_originals_file_must_compute_what_the_model_does(data, tmp_path, kind, says):
    with pytest.raises(UsageError, match=f"must run on the device as it is.*{says}"):
        ready(kind().eval(), data, tmp_path / "run")


def test_a_model_that_takes_one_batch_size_only_is_refused(data, tmp_path):
    class Flat(Net):
        def forward(self, x):
            return super().forward(x.view(1, 3, 8, 8))

    with pytest.raises(UsageError, match=r"must take inputs of shape \(2, 3, 8, 8\)") as caught:
        ready(Flat().eval(), data, tmp_path / "run")
    assert "x.flatten(1)" in caught.value.hint


@pytest.mark.parametrize(
    ("mean", "how", "notes"),
    [
        ((0.5, 0.5, 0.5), {"mean": (0.5,) * 3, "std": (0.5,) * 3}, 0),
        ((0.0, 0.0, 0.0), {"mean": (0.5,) * 3, "std": (0.5,) * 3}, 1),
        ((0.5,), {"mean": (0.5,) * 3, "std": (0.5,) * 3}, 0),
        ((0.0, 0.0, 0.0), {}, 1),
    ],
    ids=["same", "other", "of another form", "none"],
)
def test_who_normalises_otherwise_than_the_weights_were_trained_with_is_told(mean, how, notes):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    model.pretrained_cfg = {"mean": mean, "std": (0.5,) * len(mean)}  # as timm's models have it
    split = Split(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2)
    data = Data(split, split, split, **how)
    loaded = load(Task.create({"model": "own:model", "data": "own:data"}), model=model, data=data, device=FakeDevice(SLOW_CALLS))
    assert len(loaded.notes) == notes
    assert all("mean=0,0,0 and std=0.5,0.5,0.5" in note for note in loaded.notes)


def test_the_originals_bundle_says_what_it_is_of(net, data, tmp_path):
    setting = ready(net, replace(data, class_names=tuple("abcd")), tmp_path / "run")
    manifest = read_manifest(setting.models / "baseline")
    assert (manifest.classes, manifest.class_names) == (CLASSES, ("a", "b", "c", "d"))


def test_a_network_on_several_gpus_is_compressed_as_the_one_inside(net):
    assert open_weights(nn.DataParallel(copy.deepcopy(net)), None, None).state_dict().keys() == net.state_dict().keys()


def test_one_logit_for_two_classes_asks_for_a_loss(data, tmp_path):
    parts = {name: Split(getattr(data, name).inputs, getattr(data, name).targets % 2) for name in ("train", "val", "test")}
    with pytest.raises(UsageError, match="has one for all 2") as caught:
        ready(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), replace(data, classes=2, **parts), tmp_path / "run")
    assert "the loss and the score" in caught.value.hint


def test_maps_of_classes_are_no_classifier(tmp_path):
    """Libraries ask for the number of classes; each pixel has one, and those without any have another number."""
    split = Split(torch.randn(8, 3, 8, 8), torch.randint(0, 2, (8, 8, 8)).index_fill(1, torch.tensor([0]), 255))
    how = {"loss": partial(nn.functional.cross_entropy, ignore_index=255), "score": lambda outputs, targets: 0.0}
    setting = ready(nn.Conv2d(3, 2, 3, padding=1), Data(split, split, split, classes=2, **how), tmp_path / "run")
    assert not setting.data.decides


def test_a_score_that_fails_is_not_the_models_fault(net, data, tmp_path):
    setting = ready(net, replace(data, score=lambda outputs, targets: 1 / 0), tmp_path / "run")
    with pytest.raises(UsageError, match="the data's score raised ZeroDivisionError"):
        score_baseline(setting, data.val)
