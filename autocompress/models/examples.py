"""Inputs that a network is tried with where no data tells them."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from autocompress.batch import Batch, Inputs
from autocompress.errors import UsageError

USUAL_SHAPES = ((3, 224, 224), (3, 299, 299), (3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 16, 112, 112))
"""Inputs that a model is tried with when nothing says what it takes: images, and a video."""
SHAPE = re.compile(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?")
DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


@torch.inference_mode()
def example_for(model: nn.Module, reference: str, batch: int = 1, shape: str | None = None) -> Inputs:
    """A batch of zeros of the shape of an input, such as `3x224x224` or `128:int64`; None tries the usual ones.

    Several inputs are separated by commas, and may be named: `ids=128:int64,mask=128:int64`.

    Raises UsageError for another way to write a shape, and when the model takes none of the usual ones.
    """
    if shape is not None:
        return _of_shape(shape, batch)
    for usual in USUAL_SHAPES:
        example = torch.zeros((batch, *usual))
        try:
            model(example)
        except Exception:  # whatever the user's own code raises; S112 asks for a log, but a refusal is the answer here  # noqa: S112
            continue
        return example
    raise UsageError(
        f"{reference} takes none of the usual image shapes {USUAL_SHAPES}",
        hint="say what one input is: --input 3x64x64, --input 128:int64; or add --data, whose inputs tell",
    )


def _of_shape(shape: str, batch: int) -> Inputs:
    parts = [part.strip() for part in shape.split(",")]
    if len(parts) > 1 and all(map(str.isdecimal, parts)):
        raise UsageError(
            f"an input is written as its sizes with an x between, but got {shape!r}",
            hint=f"write {'x'.join(parts)}; several inputs of one size each need names: ids={parts[0]},mask={parts[1]}",
        )
    inputs = [_input(part, batch) for part in parts]
    names = tuple(name for name, _ in inputs if name)
    if names and len(set(names)) < len(inputs):
        raise UsageError(
            f"several inputs must all be named, each once, or none, but got {shape!r}", hint="for example ids=128:int64,mask=128:int64"
        )
    tensors = tuple(tensor for _, tensor in inputs)
    return Batch(tensors, names) if names or len(tensors) > 1 else tensors[0]


def _input(shape: str, batch: int) -> tuple[str, Tensor]:
    """(name or nothing, zeros) of one input."""
    found = SHAPE.fullmatch(shape)
    sizes = [int(size) for size in found[2].split("x")] if found else []
    if found is None or 0 in sizes or (found[3] or "float32") not in DTYPES:
        raise UsageError(
            f"an input is written as its sizes and, where it is not float32, its type, but got {shape!r}",
            hint=f"for example 3x224x224, or 128:int64 for 128 tokens (types: {', '.join(DTYPES)})",
        )
    return found[1] or "", torch.zeros((batch, *sizes), dtype=DTYPES[found[3] or "float32"])
