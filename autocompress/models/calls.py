"""How a network is called: with its inputs by place, and for one tensor."""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.batch import Inputs, call_network, map_inputs, names_of
from autocompress.errors import UsageError

WIDER_OR_HALF = (torch.float16, torch.bfloat16, torch.float64)
"""Precisions whose values float32 holds, or nearly; numbers of eight bits mean nothing without their scales."""
MAIN = ("logits", "out", "last_hidden_state")
"""What networks of transformers, torchvision's for segmentation and encoders call the output that counts."""


PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def in_float32(model: nn.Module) -> nn.Module:
    """The model itself, with weights of another precision turned into float32 (in place): the precision that compression starts from.

    Of one that runs on several GPUs, and nowhere else, the network inside.
    """
    model = model.module if isinstance(model, PARALLEL) else model
    return model.float() if any(parameter.dtype in WIDER_OR_HALF for parameter in model.parameters()) else model


@torch.no_grad()
def simplify_call(model: nn.Module, example: Inputs) -> str:
    """Change a model in eval mode, in place, so that it takes its inputs by place and returns one tensor.

    Returns the name of the output that is taken; empty where there is only one, or none is known to be the main one. Inputs that are named
    go to the arguments of these names. Other outputs belong to training, as those of auxiliary classifiers do.
    Raises UsageError where the model has no such arguments.
    """
    if names := names_of(example):
        _take_by_name(model, names)
    try:
        outputs = call_network(model, map_inputs(torch.clone, example))
    except Exception:  # whatever the user's own code raises: who uses the model tells
        return ""
    if not isinstance(outputs, Mapping):
        return ""
    tensors = [name for name, value in outputs.items() if isinstance(value, Tensor)]
    name = next((name for name in MAIN if name in tensors), tensors[0] if len(outputs) == len(tensors) == 1 else None)
    if name is None:
        return ""
    model.register_forward_hook(functools.partial(_take, name=name))
    return name


class _ByName:
    """A model's `forward` as a function of some of its arguments; who traces it finds their names in `__signature__`."""

    def __init__(self, forward: Callable[..., Any], names: tuple[str, ...]) -> None:
        self.forward, self._names = forward, names
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def __call__(self, *tensors: Tensor) -> Any:
        return self.forward(**dict(zip(self._names, tensors, strict=True)))

    __code__ = __call__.__code__  # torch.export asks every forward for it


def _take_by_name(model: nn.Module, names: tuple[str, ...]) -> None:
    if isinstance(model, fx.GraphModule):  # a copy of it has the code that it was made with
        raise UsageError("the inputs of a traced module have no names", hint="give a tuple of arrays, in the order of its inputs")
    forward = model.forward.forward if isinstance(model.forward, _ByName) else model.forward  # a function may return one model again
    known = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    unknown = [name for name in names if not name.isidentifier() or keyword.iskeyword(name) or (name not in known and not takes_any)]
    if unknown:
        raise UsageError(
            f"inputs must be named as the arguments of {type(model).__name__}, but it has no {unknown[0]!r}",
            hint=f"its arguments are {', '.join(known) or 'none'}; a tuple of arrays is given to the first ones",
        )
    model.forward = _ByName(forward, names)


def _take(_: nn.Module, __: object, outputs: Any, *, name: str) -> Any:
    """In training a model may answer otherwise."""
    return outputs[name] if isinstance(outputs, Mapping) else outputs
