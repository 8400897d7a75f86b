"""Whether the exported file computes what the student computes."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from autocompress.errors import PolicyFailure
from autocompress.policy import QuantSpec
from autocompress.records import SMALLEST, Parity

FLOAT_BITS, ROUNDED_BITS = 32, 16
FLOAT_TOLERANCE = 1e-4
"""Largest difference of float32 outputs; of outputs that are all smaller than 1, this share of the largest."""
FLOAT_ROUNDING = 1e-5
"""What rounding in another order does to the outputs of a deep float32 network, as a share of the largest."""
NEAR_TIE, LOW = 0.02, 0.25
"""Share of the usual range of a row's outputs, from LOW of them on, since one may be masked. Where two values of a
network round to the same integer by a hair, float and integer arithmetic part ways, and what becomes of that moves outputs by about a
percent (ResNet-18 on photos: 0.8 % on average); who leads by less has not won."""
INPUTS_A_DIFFERENCE = 200
"""Of so many inputs one decision may differ: 0.5 %."""
ROUNDED_TOLERANCE = 0.05
"""For rounded outputs that are no decisions between classes, as a share of the largest."""


def check_parity(
    expected: Tensor, actual: Tensor, quant: QuantSpec, layers: Iterable[str], *, decisions: bool = True, is_exact: bool = True
) -> Parity:
    """Compare the outputs of a student whose `layers` have the bits of `quant` with its file's. Raises PolicyFailure unless they agree.

    is_exact: whether the device computes in float32 what is in float32; else all of it is rounded.
    """
    parity = compare(expected, actual, decisions=decisions)
    require_parity(parity, {quant.of(layer) for layer in layers} | (set() if is_exact else {ROUNDED_BITS}))
    return parity


def compare(expected: Tensor, actual: Tensor, *, decisions: bool = True) -> Parity:
    """Compare the student's outputs (n x ...) with the file's; `decisions`: whether a row's largest output is its answer."""
    if expected.shape != actual.shape:
        raise PolicyFailure(f"the file's outputs must have shape {tuple(expected.shape)}, but have {tuple(actual.shape)}")
    if not torch.isfinite(expected).all():
        raise PolicyFailure("the student's outputs must be finite, but are not")
    differing, undecided = None, 0
    if decisions and expected.dim() == 2 and expected.shape[1] > 1:
        changed = expected.argmax(1) != actual.argmax(1)
        differing, undecided = int(changed.sum()), int((changed & _is_nearly_best(expected, actual.argmax(1))).sum())
    difference = float((expected - actual).abs().max()) if torch.isfinite(actual).all() else float("inf")
    return Parity(difference=difference, largest=float(expected.abs().max()), differing=differing, undecided=undecided, n=len(expected))


def _is_nearly_best(outputs: Tensor, chosen: Tensor) -> Tensor:
    """Of each row whether its largest output is hardly larger than the one that was chosen."""
    best = outputs.amax(1)
    usual = (best - outputs.kthvalue(1 + int(LOW * (outputs.shape[1] - 1)), dim=1).values).median()
    return best - outputs.gather(1, chosen.unsqueeze(1)).squeeze(1) < NEAR_TIE * usual


def require_parity(parity: Parity, bits: Collection[int]) -> None:
    """Raises PolicyFailure unless a file whose layers have these bits computes what its student does.

    Where all are 32, outputs agree to 1e-4. A file rounds weights after the batch norms are folded into them, a student before: with fewer
    bits, in storage too, decisions agree on 99.5 % of the inputs (one may always differ), near ties left out, and outputs that are no
    decisions to 5 %.
    """
    if all(width == FLOAT_BITS for width in bits):
        _require_same_floats(parity)
    elif parity.differing is not None:
        _require_same_decisions(parity, parity.differing - parity.undecided)
    elif not parity.relative <= ROUNDED_TOLERANCE:
        raise PolicyFailure(
            f"export mismatch: rounded outputs must agree to {100 * ROUNDED_TOLERANCE:.0f} %, but differ by {100 * parity.relative:.2g} %"
        )


def _require_same_floats(parity: Parity) -> None:
    allowed = max(FLOAT_TOLERANCE * min(1.0, parity.largest), FLOAT_ROUNDING * parity.largest, SMALLEST)
    if not parity.difference <= allowed:
        raise PolicyFailure(f"export mismatch: float32 outputs must agree to {allowed:.2g}, but differ by {parity.difference:.2g}")


def _require_same_decisions(parity: Parity, differing: int) -> None:
    allowed = max(1, parity.n // INPUTS_A_DIFFERENCE)
    if not (differing <= allowed and parity.relative < float("inf")):
        raise PolicyFailure(
            f"export mismatch: decisions must be equal on all but {allowed} of {parity.n} inputs, but differ on {differing}"
            + (f", {parity.undecided} near ties aside" if parity.undecided else "")
            + ("" if parity.relative < float("inf") else ", and some outputs are not finite")
        )
