"""Score the exported file with the real runtime, and a live model where no file is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.batch import call_network, joined, tensors_of
from autocompress.data import Data, Split
from autocompress.devices.base import Device
from autocompress.devices.frames import Feed
from autocompress.errors import PolicyFailure, ScoreFailure, one_line
from autocompress.records import Score

PREPARED, PREPARED_BYTES = 64, 2**26
"""Inputs that are prepared together, or one batch: one by one it takes longer than running a small network."""


def score_outputs(outputs: Tensor, targets: Tensor, data: Data) -> Score:
    """The task's score of a split's outputs. Raises PolicyFailure for outputs that are not finite, and for a score that is none."""
    if not bool(torch.isfinite(outputs).all()):
        raise PolicyFailure("the outputs of a model must be finite, but some are NaN or infinite")
    value = _own_score(outputs, targets, data) if data.score is not None else accuracy(outputs, targets)
    return Score(name=data.scored_by, value=value, direction=data.score_direction, n=len(targets))


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest output is at the target's index."""
    return float((outputs.argmax(1) == targets).float().mean())


def _own_score(outputs: Tensor, targets: Tensor, data: Data) -> float:
    assert data.score is not None
    try:
        value = float(data.score(outputs, targets))
    except Exception as error:  # whatever the user's own code raises
        raise ScoreFailure(f"the data's score raised {one_line(error)}") from error
    if not math.isfinite(value):
        raise ScoreFailure(f"the score of a model must be finite, but the data's score gave {value}")
    return value


@torch.inference_mode()
def score_model(model: nn.Module, data: Data, split: Split, *, batch_size: int = 256) -> Score:
    """Score a live model in eval mode."""
    model.eval()
    outputs = torch.cat([call_network(model, inputs).float() for inputs, _ in data.batches(split, batch_size)])
    return score_outputs(outputs, split.targets, data)


def run_artifact(device: Device, path: Path, data: Data, split: Split, batch: int) -> Tensor:
    """Outputs of an exported model for a whole split, run by the device's runtime at the deployment batch."""
    return torch.from_numpy(device.run(path, full_batches(data, split, batch))[: len(split)])


def full_batches(data: Data, split: Split, batch: int) -> Iterator[Feed]:
    """Batches of exactly `batch` examples: a file with a fixed batch takes no other; the last is filled up with repeats."""
    together = batch * max(1, data.at_most(PREPARED, PREPARED_BYTES) // batch)
    for several, _ in data.batches(split, together):
        for inputs in several.split(batch):
            full = inputs if len(inputs) == batch else joined([inputs, *[inputs[:1]] * (batch - len(inputs))])
            yield tuple(tensor.numpy() for tensor in tensors_of(full))


@torch.inference_mode()
def model_answers(model: nn.Module, data: Data, split: Split, batch: int) -> Tensor:
    """What `run_artifact` answers of the split, from the model itself."""
    return torch.cat([model(*map(torch.from_numpy, inputs)).float() for inputs in full_batches(data, split, batch)])[: len(split)]


def score_artifact(device: Device, path: Path, data: Data, split: Split, batch: int) -> Score:
    """Score the file that ships, run by the runtime that will run it."""
    return score_outputs(run_artifact(device, path, data, split, batch), split.targets, data)
