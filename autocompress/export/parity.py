"""Whether the exported file computes what the student computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import PolicyFailure

FLOAT_TOLERANCE = 1e-4
INT8_AGREEMENT = 0.995
INT8_TOLERANCE = 0.05
"""For outputs that are no decisions between classes."""


@dataclass(frozen=True)
class Parity:
    """Differences of two sets of outputs: `relative` to max(1, max |expected|), and the share of equal decisions of a classifier."""

    relative: float
    top1_agreement: float | None
    n: int


def compare(expected: Tensor, actual: Tensor, *, decisions: bool = True) -> Parity:
    """Compare the student's outputs (n x ...) with the file's; `decisions`: whether a row's largest output is its answer."""
    if expected.shape != actual.shape:
        raise PolicyFailure(f"the file's outputs must have shape {tuple(expected.shape)}, but have {tuple(actual.shape)}")
    scale = max(1.0, float(expected.abs().max()))
    agreement = None
    if decisions and expected.dim() == 2 and expected.shape[1] > 1:
        agreement = float((expected.argmax(1) == actual.argmax(1)).float().mean())
    relative = float((expected - actual).abs().max()) / scale
    return Parity(relative if torch.isfinite(actual).all() else float("inf"), agreement, len(expected))


def require_parity(parity: Parity, *, quantized: bool) -> None:
    """Raises PolicyFailure unless float32 outputs agree to 1e-4, int8 decisions on 99.5 % of the inputs, other int8 outputs to 5 %."""
    if quantized and parity.top1_agreement is not None:
        if not (parity.top1_agreement >= INT8_AGREEMENT and parity.relative < float("inf")):
            raise PolicyFailure(
                f"export mismatch: int8 decisions must agree on {100 * INT8_AGREEMENT} % of {parity.n} inputs, "
                f"but do on {100 * parity.top1_agreement:.2f} %"
            )
        return
    tolerance, bits = (INT8_TOLERANCE, "int8") if quantized else (FLOAT_TOLERANCE, "float32")
    if not parity.relative <= tolerance:
        raise PolicyFailure(f"export mismatch: {bits} outputs must agree to {tolerance}, but differ by {parity.relative:.2g}")
