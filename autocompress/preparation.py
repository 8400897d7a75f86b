"""From a task to a setting: load the model and the data, check that they fit, trace, export and measure the baseline."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.batch import Inputs, call_network, joined, map_inputs, names_of, tensors_of
from autocompress.compress.arithmetic import best_training_device
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import Tick, train
from autocompress.data import Data, Split, sample
from autocompress.data.sources import load_data
from autocompress.demo import BATCH_SIZE, LEARNING_RATE, TEACHER_EPOCHS
from autocompress.devices import open_device, processor
from autocompress.devices.base import Device
from autocompress.errors import PolicyFailure, UsageError, one_line
from autocompress.evaluate import model_answers, run_artifact, score_artifact
from autocompress.export import check_parity, weights_bytes, write_bundle
from autocompress.export.fold import fold_norms
from autocompress.failures import policy_errors
from autocompress.graph import Graph
from autocompress.graph.exported import DATA_DEPENDENT
from autocompress.graph.plain import own_copy
from autocompress.graph.trace import is_opaque
from autocompress.models import load_model, load_weights, simplify_call
from autocompress.policy import Policy, QuantSpec
from autocompress.progress import PhaseTick
from autocompress.records import Measurement, Score
from autocompress.references import draws_itself, require_name
from autocompress.run_folder import write_atomically
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.search_space import load_space
from autocompress.setting import Baseline, Setting, affordable_calibration
from autocompress.starting import UNTRAINED
from autocompress.task import Task

BASELINE = "baseline"
TEACHER_WEIGHTS, UNFINISHED_TEACHER = "teacher.safetensors", "teacher.unfinished.safetensors"
"""Weights of the demonstration's teacher. The second is written instead where training ran out of time; a resumed search takes it only
where policies were made of it already."""
PARITY_EXAMPLES = 16
"""Validation examples on which the original's file is compared with the model."""
SAME_NORMALISATION = 0.01
LOSS_EXAMPLES = 32
"""Training examples that a loss of one's own is tried on: of two, a rank or a correlation has no value."""
LEAST_VALIDATION, MOST_SHARE = 256, 5.0
"""Of validation examples there are at least so many, unless they take so many times the seconds that they should."""


@dataclass(frozen=True)
class Loaded:
    """What a task names, loaded and found to fit together; nothing is exported or measured yet.

    graphs: traced networks by `StudentSpec.reference`; None is the teacher's own. notes: what who begins a search should know of these.
    """

    device: Device
    data: Data
    teacher: nn.Module
    graphs: dict[str | None, Graph]
    example: Inputs
    notes: tuple[str, ...] = ()


def load(
    task: Task, *, model: nn.Module | None = None, data: Data | None = None, device: Device | None = None, weights: Path | None = None,
    tick: PhaseTick | None = None,
) -> Loaded:  # fmt: skip
    """Load what the task names, or take what is given. Raises UsageError when model, data and task do not fit together.

    Args:
        weights: see `kept_teacher`.
        tick: told of what takes long.
    """
    for given, reference in ((model, task.model), (data, task.data)):
        if given is None:
            require_name(reference)
    device = device or open_device(task.device)
    data = data or load_data(task.data, tick)
    _require_target(task, data)
    with torch.random.fork_rng(devices=[]):  # the same network in every process, where it has no weights of its own
        torch.manual_seed(task.seed)
        teacher = _own(model, task) if model is not None else _loaded(task, data)
        torch.manual_seed(task.seed)
        student = load_model(task.student, classes=data.classes) if task.student is not None else None
    example = data.example(task.batch)
    output = simplify_call(teacher, example)
    require_fit(teacher, data, example, task.model)
    if weights is not None:
        load_weights(teacher, weights)
    graphs: dict[str | None, Graph] = {None: Graph.trace(teacher, tensors_of(example))}
    if student is not None and task.student is not None:
        simplify_call(student, example)
        require_fit(student, data, example, task.student)
        graphs[task.student] = Graph.trace(student, tensors_of(example))
    several = f"{task.model} has several outputs: {output!r} is what is compressed" if output else ""
    told = (several, data.note, _normalised_otherwise(teacher, data), processor.clock_warning(device.environment().get("governor")))
    notes = tuple(note for note in told if note)
    return Loaded(device, data, teacher, graphs, example, notes)


def _normalised_otherwise(model: nn.Module, data: Data) -> str:
    """What to tell where timm says that the model's weights were trained on images that were normalised otherwise."""
    trained, given = getattr(model, "pretrained_cfg", None), data.normalisation
    if given is None or not isinstance(trained, Mapping) or not {"mean", "std"} <= trained.keys():
        return ""
    wanted, own = (trained["mean"], trained["std"]), (given.mean, given.std)
    if any(len(w) == len(o) and not np.allclose(w, o, atol=SAME_NORMALISATION) for w, o in zip(wanted, own, strict=True)):
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        return (
            f"timm's weights for this model were trained with mean={mean} and std={std}, but the data has other values: "
            "name these in --data (mean=...&std=...) unless the model was trained otherwise since"
        )
    return ""


def kept_teacher(task: Task, run: Path, *, begun: bool) -> Path | None:
    """The weights of the demonstration's teacher, where an interrupted search has trained it.

    begun: whether that search has made anything of it. Who resumes one that has not gets a better one where the clock cut it short.
    """
    kept = [run / name for name in (TEACHER_WEIGHTS, *([UNFINISHED_TEACHER] if begun else []))] if task.is_demo else []
    return next((path for path in kept if path.is_file()), None)


def contents(task: Task, loaded: Loaded) -> dict[str, str]:
    """Digests of what the task's names stand for: by the time a search is resumed, a name may stand for something else.

    The demonstration's teacher has none, since the search itself trains it, and neither has a function that draws policies.
    """
    networks = {} if task.is_demo else {"model": loaded.teacher}
    if task.student is not None:
        networks["student"] = loaded.graphs[task.student].module
    space = {} if draws_itself(task.space) else {"space": load_space(task.space).digest}
    return {"data": loaded.data.digest} | {what: _digest(network) for what, network in networks.items()} | space


def _digest(network: nn.Module) -> str:
    return hashlib.sha256(weights_bytes(network)).hexdigest()[:16]


def prepare(task: Task, run: Path, loaded: Loaded) -> Setting:
    """Everything that a search needs, with the baseline's latency measured (its score comes from `score_baseline`).

    Raises UsageError when the model does not run on the device as it is.
    """
    graph, models = loaded.graphs[None], run / "models"
    models.mkdir(parents=True, exist_ok=True)
    for left in models.glob(f"{UNTRAINED}*"):  # by a search that was killed
        shutil.rmtree(left, ignore_errors=True)
    baseline = _baseline(graph, loaded.teacher, loaded.data, loaded.device, models, loaded.example, task.model)
    return Setting(
        data=loaded.data,
        # the demonstration's is trained before it is asked
        teacher=_teacher(loaded.teacher if task.is_demo else _folded(graph, loaded.teacher), graph, loaded.data, task.seed),
        graphs=loaded.graphs,
        device=loaded.device,
        baseline=baseline,
        calibration_inputs=affordable_calibration(task.batch, baseline.latency_s.median),
        baseline_history=[baseline.latency_s],
        example=loaded.example,
        models=models,
        model_reference=task.model,
        learning_rate=task.learning_rate,
        batch_size=task.batch_size,
        seed=task.seed,
    )


def _teacher(model: nn.Module, graph: Graph, data: Data, seed: int) -> Teacher:
    """model: the graph's network, in whatever form answers; where its path depends on the data, its classifier may not be called."""
    classifier = None if graph.module.meta.get(DATA_DEPENDENT) else graph.classifier
    return Teacher(model.to(best_training_device()), data, classifier=classifier, seed=seed)


def _folded(graph: Graph, model: nn.Module) -> nn.Module:
    """The model as it answers soonest: traced, with its norms folded into the layers before them, which saves ResNet-56 a third.

    (`benchmarks/steps.py`)
    """
    if is_opaque(graph.module) or graph.module.meta.get(DATA_DEPENDENT):
        return model
    folded = copy.deepcopy(graph.module)
    fold_norms(folded)
    return folded


def _require_target(task: Task, data: Data) -> None:
    """Only what the data is scored by says which targets can be reached."""
    target = task.target_accuracy
    if target is not None and data.score is None and not 0 < target <= 1:
        raise UsageError(f"target_accuracy must lie in (0, 1], but got {target}", hint="write 95 % as 0.95")


def _own(model: nn.Module, task: Task) -> nn.Module:
    """A copy of an object of Python, with the weights of the task where it names some."""
    teacher = own_copy(model)
    if task.weights:
        load_weights(teacher, Path(task.weights))
    return teacher


def _require_float(model: nn.Module, reference: str) -> None:
    """Raises UsageError for a network in half precision, or one that was quantized already: its weights are packed, and not trained."""
    packed = next((name for name, module in model.named_modules() if "quantized" in type(module).__module__.split(".")), None)
    if packed is not None:
        raise UsageError(
            f"a model must be in floating point, but {packed or 'all'} of {reference} is quantized",
            hint="give the model as it was before: the search quantizes it",
        )
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        raise UsageError(f"the weights of a model must be float32, but some of {reference} are {kinds.pop()}", hint="give model.float()")


def _loaded(task: Task, data: Data) -> nn.Module:
    return load_model(task.model, weights=Path(task.weights) if task.weights else None, classes=data.classes)


def require_fit(model: nn.Module, data: Data, example: Inputs, reference: str) -> None:
    """Raises UsageError unless the model is in floating point, runs on the data, at any batch, and has an output for each class.

    Of data with a loss of its own, unless that can be computed of the model's outputs and differentiated.
    """
    _require_float(model, reference)
    outputs = _outputs(model, example, reference, "check that the data and the model belong together (channels, size)")
    _outputs(model, joined([example, example]), reference, "training uses other batches: write x.flatten(1), not x.view(1, -1)")
    if data.loss is not None:
        _require_loss(model, data, reference)
    if data.classes is None:
        return
    if outputs.dim() != 2:
        raise UsageError(
            f"a classifier must return one tensor n x classes, but {reference} returned {_shape(outputs)}",
            hint="for other tasks let the data function return autocompress.Data with its own loss and score",
        )
    if outputs.shape[1] != data.classes:
        raise UsageError(
            f"the model must have as many outputs as the data has classes, but {reference} has {outputs.shape[1]} outputs "
            f"and the data {data.classes} classes",
            hint="give the data that the model was trained on (with classes=N where some have no example), or another model",
        )
    data.require_labels()


def _require_loss(model: nn.Module, data: Data, reference: str) -> None:
    """Raises UsageError unless the data's loss of a few outputs is one finite number with a gradient: a search calls it much later."""
    assert data.loss is not None
    few = sample(data.train, min(LOSS_EXAMPLES, len(data.train)))
    outputs = _outputs(model, data.prepare(few.inputs), reference, "check that the data and the model belong together")
    form = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(few.targets.shape)} ({few.targets.dtype})"
    try:
        own = outputs.float().contiguous().clone().requires_grad_()  # as in training; nothing reaches the model
        with warnings.catch_warnings(action="ignore"):  # they will be seen when the search calls it
            loss = data.loss(own, few.targets)
            (gradient,) = torch.autograd.grad(loss, own)
        is_sound = bool(loss.isfinite()) and bool(gradient.isfinite().all())
    except Exception as error:  # whatever the user's own code raises
        raise UsageError(
            f"the data's loss must take {form}, but raised {one_line(error)}", hint="return one number that depends on the outputs"
        ) from None
    if not is_sound:
        raise UsageError(f"the data's loss must be finite, but is {loss.item():g} for {form}", hint="check the targets, and the loss")


@torch.inference_mode()
def _outputs(model: nn.Module, inputs: Inputs, reference: str, hint: str) -> Tensor:
    """What the model makes of the inputs in eval mode. Raises UsageError with this hint unless that is a tensor with a row for each."""
    was_training = model.training
    try:
        outputs = call_network(model.eval(), map_inputs(torch.clone, inputs))  # which it may change in place
    except Exception as error:  # whatever the user's own code raises
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors_of(inputs))
        rule = f"{reference} must take inputs of shape {shapes}, but raised {one_line(error)}"
        raise UsageError(rule, hint=hint) from None
    finally:
        model.train(was_training)
    if not isinstance(outputs, Tensor) or outputs.dim() < 1 or len(outputs) != len(inputs):
        if len(inputs) == 1 and isinstance(outputs, Tensor) and outputs.dim() < 2:
            hint = "where it loses the axis of the batch, write x.flatten(1) instead of x.squeeze()"
        raise UsageError(
            f"a model must return one tensor with a row for each input, but for {len(inputs)} {reference} returned {_shape(outputs)}",
            hint=hint if isinstance(outputs, Tensor) else "wrap it in a module that returns what your loss and score read",
        )
    return outputs


def _shape(outputs: object) -> str:
    return str(tuple(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__


def _baseline(
    graph: Graph,
    model: nn.Module,
    data: Data,
    device: Device,
    models: Path,
    example: Inputs,
    reference: str,
    latency_s: Measurement | None = None,
) -> Baseline:
    """The original's file, checked; its latency as measured now, unless it is known."""
    with _about_the_model(reference):
        student = build_student(graph, Policy())
        manifest = write_bundle(
            models / BASELINE, student.eval(), Policy(), tensors_of(example), model=reference, input_names=names_of(example)
        )
        path = models / BASELINE / manifest.artifact
        few, batch = sample(data.val, PARITY_EXAMPLES), len(example)
        actual = run_artifact(device, path, data, few, batch)
        expected = model_answers(model, data, few, batch)
        if not torch.isfinite(expected).all():
            raise PolicyFailure("its own outputs are not finite")
        # all that follows is compared with the file
        check_parity(expected, actual, QuantSpec(), (), decisions=data.classes is not None, is_exact=device.profile.is_exact)
        return Baseline(path=path, latency_s=latency_s or device.measure([path])[0], size_bytes=manifest.size_bytes)


@contextlib.contextmanager
def _about_the_model(reference: str) -> Iterator[None]:
    """What fails one policy fails the task where the policy is the unchanged model."""
    try:
        with policy_errors():
            yield
    except PolicyFailure as error:
        raise UsageError(
            f"{reference} must run on the device as it is, before anything is compressed, but: {error.message}",
            hint="look at what `autocompress inspect` says of it; weights that are NaN and operators that ONNX lacks are the usual reasons",
        ) from None


def score_baseline(setting: Setting, split: Split) -> Score:
    """The original's score of a split, taken from its exported file. Raises UsageError where it has none."""
    with _about_the_model(setting.model_reference), setting.ledger.spend("score"):
        return score_artifact(setting.device, setting.baseline.path, setting.data, split, setting.batch)


def limit_validation(setting: Setting, seconds: float, examples: int | None = None) -> Setting:
    """The setting with as many validation examples as the original answers in `seconds`, or with `examples` as decided before.

    Every policy of a search is scored on them: a large split run at the deployment batch would leave no time to train.
    """
    if examples is None:
        affordable = seconds * setting.batch / setting.baseline.latency_s.median
        examples = max(FEWEST_EXAMPLES, int(affordable), min(LEAST_VALIDATION, int(MOST_SHARE * affordable)))
        examples = min(examples, setting.most_answers)
    return replace(setting, data=replace(setting.data, val=sample(setting.data.val, examples)))


def train_demo_teacher(setting: Setting, run: Path, seconds: float, tick: Tick) -> Setting:
    """Train the demonstration's network for so long at most, and keep it; the setting with the trained teacher."""
    model, data = setting.teacher.model, setting.data
    steps = TEACHER_EPOCHS * (len(data.train) // BATCH_SIZE)
    deadline = time.monotonic() + seconds
    torch.manual_seed(setting.seed)
    plan = TrainPlan(steps, deadline, LEARNING_RATE, BATCH_SIZE, seed=setting.seed)
    with setting.ledger.spend("train"):
        train(model, data, plan, tick=tick)
    write_atomically(run / (TEACHER_WEIGHTS if time.monotonic() < deadline else UNFINISHED_TEACHER), weights_bytes(model))
    graph = Graph.trace(model.cpu(), tensors_of(setting.example))
    known = setting.baseline.latency_s  # of the same network with other weights
    baseline = _baseline(graph, model, data, setting.device, setting.models, setting.example, setting.model_reference, known)
    return replace(
        setting,
        teacher=_teacher(_folded(graph, model), graph, data, setting.seed),
        graphs={**setting.graphs, None: graph},
        baseline=baseline,
        activations=[],
    )
