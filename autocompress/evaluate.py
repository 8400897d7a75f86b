"""Score the exported file with the real runtime, and a live model where no file is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.data import Data, Split
from autocompress.errors import PolicyFailure
from autocompress.records import Score


def score_outputs(outputs: Tensor, targets: Tensor, data: Data) -> Score:
    """The task's score of a split's outputs. Raises PolicyFailure for outputs that are not finite."""
    if not bool(torch.isfinite(outputs).all()):
        raise PolicyFailure("the outputs of a model must be finite, but some are NaN or infinite")
    value = _own_score(outputs, targets, data) if data.score is not None else accuracy(outputs, targets)
    return Score(name=data.score_name, value=value, n=len(targets))


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest output is at the target's index."""
    return float((outputs.argmax(1) == targets).float().mean())


def _own_score(outputs: Tensor, targets: Tensor, data: Data) -> float:
    assert data.score is not None
    try:
        return float(data.score(outputs, targets))
    except Exception as error:  # whatever the user's own code raises
        raise PolicyFailure(f"the score function raised {type(error).__name__}: {error}") from error


@torch.inference_mode()
def score_model(model: nn.Module, data: Data, split: Split, *, batch_size: int = 256) -> Score:
    """Score a live model in eval mode."""
    model.eval()
    outputs = torch.cat([model(inputs).float() for inputs, _ in data.batches(split, batch_size)])
    return score_outputs(outputs, split.targets, data)


def run_file(path: Path, inputs: Sequence[np.ndarray]) -> Tensor:
    """First output of an ONNX file for one batch of inputs, in the file's order."""
    session = _session(path)
    names = [node.name for node in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, inputs, strict=True)))[0])


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_artifact(path: Path, data: Data, split: Split, batch: int) -> Tensor:
    """Outputs of an exported classifier for a whole split, run by ONNX Runtime at the deployment batch."""
    session = _session(path)
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: inputs})[0][:count] for inputs, count in full_batches(data, split, batch)]
    return torch.from_numpy(np.concatenate(outputs))


def full_batches(data: Data, split: Split, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `batch` inputs: a file with a fixed batch takes no other; the last is filled up with repeats."""
    for inputs, _ in data.batches(split, batch):
        missing = batch - len(inputs)
        full = torch.cat([inputs, inputs[:1].expand(missing, *inputs.shape[1:])]) if missing else inputs
        yield full.numpy(), len(inputs)


def score_artifact(path: Path, data: Data, split: Split, batch: int) -> Score:
    """Score the file that ships, run by the runtime that will run it."""
    return score_outputs(run_artifact(path, data, split, batch), split.targets, data)
