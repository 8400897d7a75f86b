"""Whether a model, its data and a loss fit together: told before a search begins, in one sentence each."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from autocompress.batch import Inputs, call_network, joined, map_inputs, tensors_of
from autocompress.compress.arithmetic import best_training_device
from autocompress.data import Data, sample
from autocompress.errors import UsageError, one_line

LOSS_EXAMPLES = 32
"""Training examples that a loss of one's own is tried on: of two, a rank or a correlation has no value."""


def require_fit(model: nn.Module, data: Data, example: Inputs, reference: str) -> None:
    """Raises UsageError unless the model is in floating point, runs on the data, at any batch, and has an output for each class.

    Of data with a loss of its own, unless that can be computed of the model's outputs and differentiated.
    """
    _require_float(model, reference)
    outputs = _outputs(model, example, reference, "check that the data and the model belong together (channels, size)")
    _outputs(model, joined([example, example]), reference, "training uses other batches: write x.flatten(1), not x.view(1, -1)")
    if data.loss is not None:
        _require_loss(model, data, reference)
    if not data.decides:
        return
    if outputs.dim() != 2:
        raise UsageError(
            f"a classifier must return one tensor n x classes, but {reference} returned {_shape(outputs)}",
            hint="for other tasks let the data function return autocompress.Data with its own loss and score",
        )
    if outputs.shape[1] == 1:
        raise UsageError(
            f"a classifier must have an output for each class, but {reference} has one for all {data.classes} classes",
            hint="give autocompress.Data the loss and the score of a single logit, with targets in floating point",
        )
    if outputs.shape[1] != data.classes:
        raise UsageError(
            f"the model must have as many outputs as the data has classes, but {reference} has {outputs.shape[1]} outputs "
            f"and the data {data.classes} classes",
            hint="give the data that the model was trained on (with classes=N where some have no example), or another model",
        )
    data.require_labels()


def _require_float(model: nn.Module, reference: str) -> None:
    """Raises UsageError for a network that was quantized already: its weights are packed, and not trained."""
    packed = next((name for name, module in model.named_modules() if "quantized" in type(module).__module__.split(".")), None)
    if packed is not None:
        raise UsageError(
            f"a model must be in floating point, but {packed or 'all'} of {reference} is quantized",
            hint="give the model as it was before: the search quantizes it",
        )
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        raise UsageError(f"the weights of a model must be float32, but some of {reference} are {kinds.pop()}", hint="give model.float()")


def _require_loss(model: nn.Module, data: Data, reference: str) -> None:
    """Raises UsageError unless the data's loss of a few outputs is one finite number with a gradient: a search calls it much later."""
    assert data.loss is not None
    few, device = sample(data.train, min(LOSS_EXAMPLES, len(data.train))), best_training_device()
    outputs = _outputs(model, data.prepare(few.inputs), reference, "check that the data and the model belong together")
    form = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(few.targets.shape)} ({few.targets.dtype})"
    try:
        own = outputs.float().contiguous().clone().to(device).requires_grad_()  # as in training; nothing reaches the model
        with warnings.catch_warnings(action="ignore"):  # they will be seen when the search calls it
            loss = data.loss(own, few.targets.to(device))
            (gradient,) = torch.autograd.grad(loss, own)
        is_sound = bool(loss.isfinite()) and bool(gradient.isfinite().all())
    except Exception as error:  # whatever the user's own code raises
        raise UsageError(
            f"the data's loss must take {form} on the device {device.type}, but raised {one_line(error)}",
            hint="return one number that depends on the outputs, and move what it weights them by to outputs.device",
        ) from None
    if not is_sound:
        raise UsageError(f"the data's loss must be finite, but is {loss.item():g} for {form}", hint="check the targets, and the loss")


@torch.inference_mode()
def _outputs(model: nn.Module, inputs: Inputs, reference: str, hint: str) -> Tensor:
    """What the model makes of the inputs in eval mode. Raises UsageError with this hint unless that is a tensor with a row for each."""
    was_training = model.training
    try:
        outputs = call_network(model.eval(), map_inputs(torch.clone, inputs))  # which it may change in place
    except Exception as error:  # whatever the user's own code raises
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors_of(inputs))
        rule = f"{reference} must take inputs of shape {shapes}, but raised {one_line(error)}"
        raise UsageError(rule, hint=hint) from None
    finally:
        model.train(was_training)
    if not isinstance(outputs, Tensor) or outputs.dim() < 1 or len(outputs) != len(inputs):
        if len(inputs) == 1 and isinstance(outputs, Tensor) and outputs.dim() < 2:
            hint = "where it loses the axis of the batch, write x.flatten(1) instead of x.squeeze()"
        raise UsageError(
            f"a model must return one tensor with a row for each input, but for {len(inputs)} {reference} returned {_shape(outputs)}",
            hint=hint if isinstance(outputs, Tensor) else "wrap it in a module that returns what your loss and score read",
        )
    return outputs


def _shape(outputs: object) -> str:
    return str(tuple(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__
