"""How students begin: as their structure alone, reconstructed from the teacher, or where earlier training ended."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import fx

from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.train import train_quantized
from autocompress.export import weights_bytes
from autocompress.models import load_tensor_state
from autocompress.policy import Policy
from autocompress.setup.setting import Setting
from autocompress.system.failures import note_error
from autocompress.system.run_folder import write_atomically

FLOAT_WEIGHTS = "float.safetensors"
"""Beside the files of a bundle: what its training goes on from."""
UNTRAINED = "untrained-"
"""How the folders of networks begin that are only measured, and removed at once."""
INTERRUPTED = "interrupted-"
"""Begins the name of what a student has learned and that is not evaluated yet, or not learned to the end; its policy's digest follows."""


def untrained_student(
    setting: Setting, policy: Policy, *, reconstructed: bool = False, calibration_inputs: int | None = None
) -> fx.GraphModule:
    """The student's structure with calibrated quantizers: as fast as the trained one, without its accuracy.

    `reconstructed`, it has some of that. A few `calibration_inputs` are enough where only its latency is asked for.
    """
    student = build_student(setting.graph_of(policy), policy)
    if reconstructed and setting.changes_shape(policy):
        _reconstruct(setting, student, policy, until=math.inf)
    plan = TrainPlan(steps=0, calibration_inputs=calibration_inputs or setting.calibration_inputs)
    return train_quantized(student, policy.quant, setting.data, plan)


def interrupted_weights(setting: Setting, policy: Policy) -> Path:
    """Where weights are kept of a student whose evaluation was interrupted."""
    return setting.models / f"{INTERRUPTED}{policy.digest}.safetensors"


def keep_interrupted(setting: Setting, student: fx.GraphModule, policy: Policy) -> None:
    """Keep what a student has learned so far, where that can be; a disk that is full must not hide what has ended the search."""
    with suppress(Exception):
        if all(bool(parameter.isfinite().all()) for parameter in student.parameters()):
            write_atomically(interrupted_weights(setting, policy), weights_bytes(student))


def keep_for_further_training(setting: Setting, policy: Policy, bundle: Path) -> None:
    """Put what a student has learned beside its files, where it is evaluated."""
    with suppress(FileNotFoundError):  # of one that was not trained
        interrupted_weights(setting, policy).replace(bundle / FLOAT_WEIGHTS)


def forget_interrupted(setting: Setting, wanted: Collection[Policy] = ()) -> None:
    """Remove what is kept of students that nobody goes on with, when the search has ended by itself; not that of those still wanted."""
    kept = {interrupted_weights(setting, policy) for policy in wanted}
    for left in setting.models.glob(f"{INTERRUPTED}*"):
        if left not in kept:
            left.unlink(missing_ok=True)


def start_student(setting: Setting, student: fx.GraphModule, policy: Policy, continues: str | None, until: float) -> None:
    """Let a student begin where its training was interrupted, or the lower rung ended; else reconstructed where it has another shape."""
    known = [interrupted_weights(setting, policy), *([setting.models / continues / FLOAT_WEIGHTS] if continues is not None else [])]
    if any(_continue_from(student, path) for path in known):
        return
    if setting.changes_shape(policy):
        _reconstruct(setting, student, policy, until)


def _continue_from(student: fx.GraphModule, path: Path) -> bool:
    """Whether the weights of a lower rung are there: a missing or damaged checkpoint costs training time, not the policy."""
    before = copy.deepcopy(student.state_dict())
    try:
        load_tensor_state(student, load_file(path))
    except (OSError, SafetensorError, RuntimeError):  # the last of one that is another student's, which may be loaded in part
        student.load_state_dict(before)
        return False
    return True


def _reconstruct(setting: Setting, student: fx.GraphModule, policy: Policy, until: float) -> None:
    """Let a student that was made of its teacher begin with what it can do of the teacher's work."""
    if policy.student.reference is not None:
        return
    inherited = copy.deepcopy(student.state_dict())
    try:
        with setting.ledger.spend("reconstruct"):
            reconstruct(student, setting.teacher_activations, policy, until=until)
    except (RuntimeError, MemoryError):  # out of memory, or equations without a solution: the student can be trained all the same
        note_error(setting.log)
        student.load_state_dict(inherited)
