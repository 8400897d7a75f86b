"""Least squares with a ridge towards inherited weights: the normal equations, and which ridge is taken."""

from __future__ import annotations

import pytest
import torch

from autocompress.compress.least_squares import Moments, solve


@pytest.mark.parametrize(("rows", "noise", "fitted"), [(400, 0.1, True), (40, 10.0, False)], ids=["signal", "noise"])
def test_weights_leave_what_they_inherited_only_for_what_holds_on_other_examples(rows, noise, fitted):
    draw = torch.Generator().manual_seed(0)
    inherited, x = torch.zeros(1, 3, 20), torch.randn(rows, 1, 20, generator=draw)
    truth = torch.randn(1, 3, 20, generator=draw) if fitted else inherited
    y = torch.einsum("rgi,goi->rgo", x, truth) + noise * torch.randn(rows, 1, 3, generator=draw)
    weight, _ = solve(x, y, inherited, free=True)
    assert torch.equal(weight, inherited) != fitted
    assert not fitted or float((weight - truth).abs().max()) < 0.05


@pytest.mark.parametrize("free", [True, False])
def test_the_solution_is_that_of_the_normal_equations(free):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 4, generator=draw) + 1.0, torch.randn(2, 50, 3, generator=draw)
    inherited = torch.randn(2, 3, 4, generator=draw)
    weight, bias = Moments.of(x, y, free=free).solution(torch.zeros(2), inherited)
    for group in range(2):
        columns = torch.cat([x[group], torch.full((50, 1), float(free))], 1)
        expected = torch.linalg.pinv(columns) @ y[group]
        torch.testing.assert_close(weight[group], expected[:4].T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias[group], expected[4] * free, atol=1e-4, rtol=1e-4)


def test_inputs_far_from_zero_lose_no_digits():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 1, 6, generator=draw)
    truth = torch.randn(1, 2, 6, generator=draw)
    y = torch.einsum("rgi,goi->rgo", x, truth)
    weight, _ = solve(x + 1e4, y, torch.zeros(1, 2, 6), free=True)
    torch.testing.assert_close(weight, truth, atol=0.02, rtol=0.02)


def test_equations_without_a_solution_leave_weights_as_they_were():
    inherited, nothing = torch.randn(1, 2, 6), torch.full((1, 6, 6), -1.0, dtype=torch.float64)
    moments = Moments(10, torch.zeros(1, 6).double(), torch.zeros(1, 2).double(), nothing, torch.ones(1, 6, 2).double())
    weight, _ = moments.solution(torch.tensor([1e-3]), inherited)
    assert torch.equal(weight, inherited)


def test_without_other_examples_to_tell_weights_stay_as_they_were():
    inherited = torch.randn(1, 2, 6)
    weight, _ = solve(torch.randn(1, 1, 6), torch.randn(1, 1, 2), inherited, free=True)
    assert torch.equal(weight, inherited)
