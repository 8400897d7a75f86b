"""One policy without a search: compress, export, check, measure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.batch import random_like, tensors_of
from autocompress.commands.deploy import require_free, require_harmless, whole_folder
from autocompress.data import Data, Split
from autocompress.data.sources import Splits
from autocompress.errors import UsageError
from autocompress.export import now, update_manifest
from autocompress.models import example_for
from autocompress.policy import Policy
from autocompress.references import DEFAULT_DEVICE, name_of
from autocompress.report.view import agreement, format_score
from autocompress.search_space import suggest_of, with_default_distillation, with_exact_int8
from autocompress.setup.loading import load, open_data, open_weights
from autocompress.setup.setting import Setting
from autocompress.suggesters import LevelSuggester
from autocompress.system.failures import refused
from autocompress.task import Task
from autocompress.trial.evaluate import score_outputs
from autocompress.trial.objective import check_artifact
from autocompress.trial.preparation import limit_validation, prepare
from autocompress.trial.starting import untrained_student
from autocompress.units import format_duration, format_size

RANDOM = "random:"
RANDOM_INPUTS, RANDOM_BYTES = 256, 2**28
"""At most, where there is no data."""
MOST_VALIDATION_S = 60.0
"""Of the original: of more examples a part is scored that is always the same."""


def apply_policy(
    model: nn.Module | str, *, policy: Policy | Path | str, out: Path | str, weights: Path | str | None = None,
    data: Data | Splits | str | None = None,
    input: str | None = None, batch: int = 1, device: str = DEFAULT_DEVICE, space: str = "default", student: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compress, export and check one policy without training.

    With data, the student is reconstructed and int8 ranges are fitted to it; without, ranges come from random inputs.

    Args:
        model: a module (never changed) or a reference. data: see `search`.
        input: without data, the shapes of the inputs, as in `inspect_model`.
        policy: a policy or its file, whose int8 weights are kept in a range that the device computes with exactly; or `random:SEED` for
            one drawn from `space`.
        student: reference of another architecture to derive the student from; a policy file that names a user's function needs it too.

    Returns what was built and measured, for people. Raises UsageError, also when the policy cannot become an artifact.
    """
    out, weights = Path(out).absolute(), Path(weights) if weights is not None else None
    require_free(out)
    told = policy.in_words() if isinstance(policy, Policy) else str(policy)
    given = policy if isinstance(policy, Policy) else Policy.from_json(_read(told)) if not told.startswith(RANDOM) else None
    if given is not None and given.student.reference not in (None, model, student):
        require_harmless(given.student.reference, "--student")
    seed = _seed(told.removeprefix(RANDOM)) if given is None else 0
    loaded = open_data(data) if data is not None else _random_data(open_weights(model, weights, None), name_of(model), input)
    task = Task.create({
        "model": name_of(model), "data": name_of(data or "random"), "device": device, "batch": batch, "space": space,
        "weights": str(weights) if weights is not None else None, "student": given.student.reference if given else student,
    })  # fmt: skip
    cannot = refused(f"the policy {told!r} cannot become a file that runs")
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder, cannot, whole_folder(out) as made:
        named = load(task, model=None if isinstance(model, str) else model, data=loaded)
        setting = limit_validation(prepare(task, Path(folder), named), MOST_VALIDATION_S)
        chosen = with_exact_int8(given, setting.device.profile) if given else _draw(task, seed, setting)
        compressed = untrained_student(setting, chosen, reconstructed=data is not None)
        path = made / setting.write(made, compressed, chosen).artifact
        outputs, parity = check_artifact(setting, compressed, path, chosen)
        before, after = setting.device.measure([setting.baseline.path, path])
        score = score_outputs(outputs, setting.data.val.targets, setting.data) if data is not None else None
        update_manifest(
            made,
            {
                "device": setting.device.name,
                "scored_on": setting.device.name if score is not None else None,
                "latency_s": after.beside(before),
                "baseline_latency_s": before,
                "measured_at": now(),
                "val_score": score,
                "parity": parity,
            },
        )
        return {
            "policy": chosen.in_words(distilled=False), "digest": chosen.digest, "folder": str(out),
            "latency": format_duration(after.median), "original_latency": format_duration(before.median),
            "latency_s": after.median, "original_latency_s": before.median, "speedup": before.median / after.median,
            "size": format_size(path.stat().st_size), "original_size": format_size(setting.baseline.size_bytes),
            "size_bytes": path.stat().st_size, "original_size_bytes": setting.baseline.size_bytes,
            "agreement_with_student": agreement(parity),
            "largest_difference": parity.relative,
            "validation": f"{format_score(score)} of {score.n} examples" if score else "no data: nothing to score",
            "trained": "no: search trains, apply only reconstructs layers" if data is not None else "no: search trains, apply does not",
        }  # fmt: skip


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"the policy file {path!r} cannot be read: {error.strerror}", hint="give a policy.json, or random:SEED") from None


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"random: must be followed by a whole number, but got {text!r}", hint="for example random:7")
    return int(text)


def _draw(task: Task, seed: int, setting: Setting) -> Policy:
    suggest = suggest_of(task, setting.graphs, setting.device.profile)
    return with_default_distillation(suggest)(LevelSuggester(np.random.default_rng(seed)))


def _random_data(model: nn.Module, reference: str, shape: str | None) -> Data:
    """Random inputs of the model's shape, for the ranges of int8 and for comparing outputs; it has no score."""
    example = example_for(model, reference, shape=shape)
    n = max(1, min(RANDOM_INPUTS, RANDOM_BYTES // max(1, sum(tensor[:1].nbytes for tensor in tensors_of(example)))))
    split = Split(random_like(example, n), torch.zeros(n, dtype=torch.long))
    parts = split, split[slice(0, 64)], split[slice(0, 1)]
    return Data(*parts, loss=lambda outputs, targets: outputs.square().mean(), score=lambda outputs, targets: float("nan"))  # never trained
