"""From a task to what it names: model, data, device and traced networks, which fit together; nothing is exported or measured yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autocompress.batch import Inputs, tensors_of
from autocompress.data import Data
from autocompress.data.sources import Splits, as_data, load_data
from autocompress.devices import open_device, processor
from autocompress.devices.base import Device
from autocompress.errors import UsageError
from autocompress.export import weights_bytes
from autocompress.graph import Graph
from autocompress.graph.plain import own_copy
from autocompress.models import example_for, in_float32, load_model, load_weights, simplify_call
from autocompress.references import draws_itself, name_of, require_name
from autocompress.search_space import load_space
from autocompress.setup.preflight import require_fit
from autocompress.system.progress import PhaseTick
from autocompress.task import Task

TEACHER_WEIGHTS, UNFINISHED_TEACHER = "teacher.safetensors", "teacher.unfinished.safetensors"
"""Weights of the demonstration's teacher. The second is written instead where training ran out of time; a resumed search takes it only
where policies were made of it already."""
SAME_NORMALISATION = 0.01


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
        teacher = open_weights(model if model is not None else task.model, Path(task.weights) if task.weights else None, data.classes)
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


@dataclass(frozen=True)
class Opened:
    """A model by itself, traced. output: the one of several that is taken, or empty."""

    graph: Graph
    example: Inputs
    output: str


def open_model(
    given: nn.Module | str, *, weights: Path | None, data: Data | Splits | str | None, input: str | None, batch: int = 1
) -> Opened:
    """A model or what its reference names, traced on the inputs of data, else on those of the shape that `input` says (`example_for`).

    Raises UsageError when the model or the data do not load, or do not fit together.
    """
    loaded = open_data(data) if data is not None else None
    model = open_weights(given, weights, loaded.classes if loaded is not None else None)
    example = loaded.example(batch) if loaded is not None else example_for(model, name_of(given), batch, input)
    output = simplify_call(model, example)
    return Opened(Graph.trace(model, tensors_of(example)), example, output)


def open_weights(given: nn.Module | str, weights: Path | None, classes: int | None) -> nn.Module:
    """The model that a reference names, or a copy of a module; with the weights of a file where one is given."""
    if isinstance(given, str):
        return load_model(given, weights=weights, classes=classes)
    model = in_float32(own_copy(given))
    if weights is not None:
        load_weights(model, weights)
    return model


def open_data(given: Data | Splits | str) -> Data:
    """The data that a reference names, or that Python gives."""
    return load_data(given) if isinstance(given, str) else as_data(given, "data")


def _require_target(task: Task, data: Data) -> None:
    """Only what the data is scored by says which targets can be reached."""
    target = task.target_accuracy
    if target is not None and data.score is None and not 0 < target <= 1:
        raise UsageError(f"target_accuracy must lie in (0, 1], but got {target}", hint="write 95 % as 0.95")


def _normalised_otherwise(model: nn.Module, data: Data) -> str:
    """What to tell where the model's library says that its weights were trained on images that were normalised otherwise."""
    trained, given = getattr(model, "pretrained_cfg", None), data.normalisation
    if given is None or not isinstance(trained, Mapping) or not {"mean", "std"} <= trained.keys():
        return ""
    wanted, own = (trained["mean"], trained["std"]), (given.mean, given.std)
    channels = data.train.input_shapes[0][0]
    if any(
        (len(o) == len(w) or (len(o) == 1 and channels == len(w))) and not np.allclose(w, o, atol=SAME_NORMALISATION)
        for w, o in zip(wanted, own, strict=True)
    ):
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        return (
            f"the weights that are published of this model were trained with mean={mean} and std={std}, but the data has other values: "
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
