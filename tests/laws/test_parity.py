"""When the outputs of a file and of its student count as alike."""

from __future__ import annotations

import pytest
import torch

from autocompress.errors import PolicyFailure
from autocompress.export import compare, require_parity
from autocompress.records import Parity


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_parity(bad):
    outputs = torch.randn(4, 3)
    broken = outputs.clone()
    broken[1, 1] = bad
    for bits in (4, 8, 32):
        for decisions in (False, True):
            with pytest.raises(PolicyFailure):
                require_parity(compare(outputs, broken, decisions=decisions), {bits})
            with pytest.raises(PolicyFailure, match="the student's outputs must be finite"):
                compare(broken, outputs, decisions=decisions)


def test_every_changed_decision_counts_and_shapes_must_match():
    outputs = torch.tensor([[5.0, 4.99, -5.0], [5.0, 4.0, -5.0]])
    changed = outputs.clone()
    changed[0] = torch.tensor([4.99, 5.0, -5.0])
    parity = compare(outputs, changed)
    assert (parity.differing, parity.undecided, parity.n) == (1, 1, 2), "it was a near tie"
    changed[1] = torch.tensor([4.0, 5.0, -5.0])
    parity = compare(outputs, changed)
    assert (parity.differing, parity.undecided) == (2, 1), "a tenth of the range is none"
    changed[0] = torch.tensor([0.0, 0.0, 5.0])
    assert compare(outputs, changed).undecided == 0, "what was chosen is none of the two that were near"
    with pytest.raises(PolicyFailure, match="shape"):
        compare(outputs, outputs[:1])


def test_two_classes_may_be_near_and_a_masked_one_makes_no_others_near():
    outputs = torch.tensor([[0.0, 4.0], [3.0, 0.0], [0.0, 5.0], [0.02, 0.0], [1.0, 0.0]])
    changed = outputs.clone()
    changed[3:] = changed[3:].flip(1)
    assert (compare(outputs, changed).differing, compare(outputs, changed).undecided) == (2, 1)
    masked = torch.cat([torch.full((5, 1), -1e4), outputs, outputs.flip(1)], dim=1)
    swapped = masked.clone()
    swapped[4] = torch.tensor([-1e4, 0.0, 1.5, 0.0, 1.0])
    assert compare(masked, swapped).undecided == 0


@pytest.mark.parametrize(("n", "differing", "agrees"), [(50, 1, True), (50, 2, False), (399, 1, True), (400, 2, True), (400, 3, False)])
@pytest.mark.parametrize("bits", [{8, 32}, {4}, {16, 32}], ids=str)
def test_few_decisions_of_rounded_layers_may_differ_and_one_always(n, differing, agrees, bits):
    parity = Parity(difference=0.5, largest=10.0, differing=differing + 7, undecided=7, n=n)
    if agrees:
        require_parity(parity, bits)
    else:
        with pytest.raises(PolicyFailure, match=f"of {n} inputs, but differ on {differing}"):
            require_parity(parity, bits)
    with pytest.raises(PolicyFailure, match="float32 outputs"):
        require_parity(parity, {32})


@pytest.mark.parametrize(
    ("largest", "difference", "agrees"),
    [(1.0, 9e-5, True), (1.0, 2e-4, False), (8.0, 2e-4, False), (0.01, 9e-7, True), (0.01, 5e-6, False), (1e4, 0.09, True),
     (1e4, 0.2, False), (0.0, 0.0, True), (0.0, 1e-9, False)],
)  # fmt: skip
def test_float_outputs_agree_to_a_ten_thousandth_also_where_they_are_small(largest, difference, agrees):
    expected = torch.tensor([[largest, 0.0]], dtype=torch.float64)
    parity = compare(expected, expected - torch.tensor([difference, 0.0], dtype=torch.float64))
    if agrees:
        require_parity(parity, {32})
    else:
        with pytest.raises(PolicyFailure, match="float32 outputs must agree"):
            require_parity(parity, {32})


def test_rounded_outputs_that_are_no_decisions_agree_to_five_percent():
    outputs = 1e-3 * torch.tensor([[1.0, 0.5], [0.1, 0.7]])
    require_parity(compare(outputs, 1.04 * outputs, decisions=False), {16, 32})
    with pytest.raises(PolicyFailure, match="5 %, but differ by 6 %"):
        require_parity(compare(outputs, 1.06 * outputs, decisions=False), {16, 32})
