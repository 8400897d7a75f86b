"""What layers inside read is compared as in closed form, with the gradient that autograd finds and the layout of the map."""

import pytest
import torch
import torch.nn.functional as F

from autocompress.compress.distill import Answers, Compared, ComparedFeatures
from autocompress.compress.hidden import compare_hidden

CHANNELS = {1: (torch.tensor([0, 2]), torch.tensor([1, 3]))}
ROWS_AND_CHANNELS = {1: (torch.tensor([0, 2]), torch.tensor([4, 1])), 2: (torch.tensor([3, 1]), torch.tensor([0, 2]))}


def test_hidden_features_are_compared_on_the_inputs_of_which_the_teachers_are_known():
    """In units of the teacher's variance of a channel over inputs and positions; what only one of the two has does not count."""
    generator = torch.Generator().manual_seed(0)
    own, wanted = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(2, 4, 4, 4, generator=generator)
    tokens, teachers = torch.randn(6, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    layers = (Compared("conv.0", "conv", shared=CHANNELS), Compared("tokens", "tokens", axis=2), Compared("gone", "gone"))
    compared = ComparedFeatures("linear", hidden=layers)
    student, teacher = Answers(own, own, {"conv.0": own, "tokens": tokens}), Answers(wanted, wanted, {"conv": wanted, "tokens": teachers})
    pairs = ((own[:2, [0, 2]], wanted[:, [1, 3]]), (tokens[:2].transpose(1, 2), teachers.transpose(1, 2)))
    expected = [((mine - theirs) ** 2).mean() / theirs.transpose(0, 1).flatten(1).var(1).mean() for mine, theirs in pairs]
    assert compare_hidden(student, teacher, compared).item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)
    assert compare_hidden(student, Answers(wanted, wanted), compared) is None
    assert compare_hidden(teacher, teacher, ComparedFeatures("linear", hidden=layers[1:])).item() == 0.0


def compared(own: torch.Tensor, wanted: torch.Tensor, layer: Compared) -> torch.Tensor | None:
    return compare_hidden(Answers(own, None, {"a": own}), Answers(wanted, None, {"b": wanted}), ComparedFeatures(hidden=(layer,)))


@pytest.mark.parametrize("shared", [{}, CHANNELS, ROWS_AND_CHANNELS], ids=["all", "channels", "two axes"])
def test_the_gradient_is_autograds(shared):
    own = torch.randn(6, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    layer = Compared("a", "b", shared=shared)
    mine, theirs = layer.of(own[:2], wanted)
    expected = F.mse_loss(mine, theirs) / theirs.transpose(0, 1).flatten(1).var(1).mean()
    found = compared(own, wanted, layer)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(3 * loss, own)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-12)
    assert not gradients[0][2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_layout_and_the_arithmetic_of_the_map(dtype):
    """Another layout would slow all that the gradient is added to."""
    own = torch.randn(6, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    wanted = torch.randn(2, 3, 4, 4)
    seen = []
    same = own.clone()
    same.register_hook(seen.append)
    compared(same, wanted, Compared("a", "b")).backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].dtype == dtype


def test_maps_of_other_shapes_are_not_compared():
    assert compared(torch.zeros(6, 3, 4, 4), torch.ones(2, 3, 5, 5), Compared("a", "b")) is None
    assert compared(torch.zeros(6, 3, 4, 4), torch.ones(2, 5, 4, 4), Compared("a", "b", shared=CHANNELS)) is not None
