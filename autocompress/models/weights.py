"""Weights that come from a file: safetensors, or what torch.save has written, read without executing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.errors import UsageError
from autocompress.references import nearest

STATES = ("state_dict", "model_state_dict", "model")
"""Names that training scripts give the state dict in a checkpoint."""
COUNTER = "num_batches_tracked"
"""Of batch norms; files of old versions of torch lack it, and nothing depends on it."""
COUNTED = ("total_ops", "total_params")
"""What thop leaves in a network whose operations it has counted."""
CUT_SHORT = re.compile("incomplete|central directory|EOF|header ?too ?small|invalid ?header ?length", re.IGNORECASE)
"""What torch and safetensors say of a file that was cut off."""
REFUSED = re.compile(r"Unsupported (?:global|class|operand)[^.]*?: ?(?:GLOBAL )?([\w.]+)")
"""What torch says of a file that holds more than tensors."""
FEW_NAMES = 4
"""Of a state dict that are looked for in another one, with more in front of them."""


def tensor_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name. What else a state dict may hold (`get_extra_state`) is no weight, and stays with the module."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def load_tensor_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The other way round. Raises RuntimeError unless every name and shape fits."""
    others = {name: value for name, value in module.state_dict().items() if not isinstance(value, Tensor)}
    module.load_state_dict({**others, **state})


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a file of weights into the model. Raises UsageError unless every name and shape fits."""
    own = tensor_state(model)
    state = _unwrapped(read_state(path), own)
    state = {key: value for key, value in state.items() if key in own or not _is_computed(key, value, model)}
    missing, unexpected = _missing(own, state), sorted(set(state) - set(own))
    if unexpected or missing:
        key = (unexpected or missing)[0]
        verb = "has" if unexpected else "lacks"
        raise UsageError(
            f"the weights {str(path)!r} do not fit the model: the file {verb} {key!r}", hint=nearest(key, own if unexpected else state)
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UsageError(
                f"the weights {str(path)!r} do not fit the model: {key} must have shape {tuple(own[key].shape)}, "
                f"but got {tuple(value.shape)}",
                hint="these are the weights of another model, or for another number of classes than --data says (1000 without it; of an "
                "image folder its folders): give that model, its own --weights, or --data",
            )
    model.load_state_dict(state, strict=False)


def _unwrapped(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state by the model's names, where one of the two is the other within a module: all names then begin with its name.

    Data parallelism, `torch.compile` and Lightning's modules wrap a network so; a user's wrapper does what a checkpoint has not seen.
    What a checkpoint has beside the network (a loss with weights) is left out.
    """
    if set(own) & set(state):
        return state
    within = {prefix: _inside(state, prefix) for prefix in _prefixes(state, own)}
    named = {prefix: inside for prefix, inside in within.items() if not _missing(own, inside)}
    fitting = {
        prefix: inside for prefix, inside in named.items() if all(inside[key].shape == own[key].shape for key in own if key in inside)
    }
    fitting = fitting or named  # none has the shapes, which is told later
    if fitting:
        first, *others = fitting.values()
        if any(not torch.equal(first[key], other[key]) for other in others for key in own if key in first and key in other):
            names = ", ".join(repr(prefix.rstrip(".")) for prefix in fitting)
            raise UsageError(
                f"the weights must be those of one network, but {names} all fit the model, and differ",
                hint="save the one that is meant by itself: torch.save(network.state_dict(), ...)",
            )
        return first
    for prefix in _prefixes(own, state):
        if all(key.startswith(prefix) for key in own):
            return {prefix + key: value for key, value in state.items()}
    return state


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_computed(key: str, value: Tensor, model: nn.Module) -> bool:
    """Whether the model makes this itself, and no longer saves it as older versions of its code did; or a profiler has counted it."""
    known = dict(model.named_buffers()).get(key)
    return (known is not None and known.shape == value.shape) or key.endswith(COUNTED)


def _prefixes(outer: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> list[str]:
    """What may stand in front of all names of `inner` to make those of `outer`, the shortest first."""
    found = {key.removesuffix(name) for name in sorted(inner, key=len)[:FEW_NAMES] for key in outer if key.endswith(f".{name}")}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What a model needs that a state lacks: it may name once what several parts share, and counters of norms not at all."""
    known = {(value.data_ptr(), value.shape) for key, value in own.items() if key in state}
    lacking = (key for key, value in own.items() if key not in state and (value.data_ptr(), value.shape) not in known)
    return sorted(key for key in lacking if not key.endswith(COUNTER))


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch state dict; pickled code is never executed."""
    if not path.is_file():
        raise UsageError(f"the weights file {str(path)!r} does not exist", hint="give a state dict or a safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each raise their own kinds
        hint = "give a state dict (torch.save(model.state_dict(), ...)) or safetensors; for a whole model use --model file.py:function"
        refused = REFUSED.search(str(error))
        cut = "it ends before its last tensor" if CUT_SHORT.search(f"{type(error).__name__} {error}") else type(error).__name__
        reason = f"it holds more than tensors ({refused[1]})" if refused else cut
        raise UsageError(f"the weights {str(path)!r} ({path.stat().st_size} bytes) cannot be read: {reason}", hint=hint) from None
    inside = next((key for key in STATES if isinstance(state, dict) and isinstance(state.get(key), dict)), None)
    state = state[inside] if inside is not None else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = f" with the keys {', '.join(map(repr, [*state][:6]))}" if isinstance(state, dict) else ""
        raise UsageError(
            f"the weights {str(path)!r} must hold a state dict of tensors, but got {type(state).__name__}{keys}",
            hint="save model.state_dict(); for a whole model use --model file.py:function",
        )
    return state
