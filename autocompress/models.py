"""Load the user's model: `torchvision:NAME`, `timm:NAME` (`?pretrained=true`), `package.module:function`, `file.py:function`."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.batch import Batch, Inputs, call_network, map_inputs, names_of
from autocompress.errors import UsageError, one_line
from autocompress.references import call_function, nearest, parse_reference


def load_model(reference: str, *, weights: Path | None = None, classes: int | None = None) -> nn.Module:
    """The model in eval mode on the CPU, with `weights` loaded.

    Args:
        reference: see the module docstring.
            `?pretrained=true` loads the weights that torchvision or timm publish, which they download once.
        weights: safetensors, or a state dict saved by torch.save (read with weights_only=True).
        classes: number of outputs asked of torchvision and timm models; None leaves their default.

    Raises UsageError when the model or the weights do not load.
    """
    name, options = parse_reference(reference)
    library = next((library for library in LIBRARIES if name.startswith(f"{library}:")), None)
    if library is not None:
        model = LIBRARIES[library](name.removeprefix(f"{library}:"), classes, _pretrained(reference, options, weights))
    elif ":" in name and options:
        raise UsageError(
            f"a function that builds a model takes no options, but got {reference!r}",
            hint="write another function of that file, which builds what you want",
        )
    elif ":" in name:
        model = call_function(name)
    else:
        raise UsageError(
            f"unknown model {reference!r}",
            hint="use torchvision:NAME, timm:NAME, package.module:function or file.py:function",
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"{reference} must return a torch.nn.Module, but got {type(model).__name__}", hint="return the model itself")
    if weights is not None:
        load_weights(model, weights)
    return model.cpu().eval()


def _pretrained(reference: str, options: dict[str, str], weights: Path | None) -> bool:
    """Whether the reference asks for published weights. Raises UsageError for other options, and where there is a weights file too."""
    if set(options) - {"pretrained"} or options.get("pretrained", "true") not in ("true", "false"):
        raise UsageError(
            f"a model of a library takes the option pretrained=true or =false, but got {reference!r}",
            hint="for example torchvision:resnet18?pretrained=true",
        )
    pretrained = options.get("pretrained") == "true"
    if pretrained and weights is not None:
        raise UsageError(
            f"a model has either published weights or those of a file, but got {reference!r} and {str(weights)!r}",
            hint="leave out pretrained=true or --weights",
        )
    return pretrained


def _torchvision(name: str, classes: int | None, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UsageError(f"unknown model torchvision:{name}", hint=nearest(name, models.list_models()))
    if pretrained:
        model = _published(f"torchvision:{name}", lambda: models.get_model(name, weights="DEFAULT"))
        known = models.get_model_weights(name).DEFAULT.meta.get("categories")
        return _with_classes(model, f"torchvision:{name}", len(known) if known else None, classes)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else the backbone's would be downloaded
    return models.get_model(name, weights=None, **options)


def _timm(name: str, classes: int | None, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UsageError("timm is not installed", hint='pip install "autocompress[timm]"') from None
    if not timm.is_model(name):
        raise UsageError(f"unknown model timm:{name}", hint=nearest(name, timm.list_models()))
    if pretrained:
        model = _published(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))
        return _with_classes(model, f"timm:{name}", getattr(model, "num_classes", None), classes)
    return timm.create_model(name, pretrained=False, **({} if classes is None else {"num_classes": classes}))


def _published(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights from the network. Raises UsageError when there are none, or they cannot be had."""
    try:
        return build()
    except Exception as error:  # whatever stands between this machine and a hub
        raise UsageError(
            f"the published weights of {name} cannot be loaded: {one_line(error)}",
            hint="download them elsewhere, and give the file as --weights",
        ) from error


def _with_classes(model: nn.Module, name: str, known: int | None, classes: int | None) -> nn.Module:
    """The model itself. Raises UsageError where its weights tell other classes apart than the data has."""
    if classes is not None and known is not None and known != classes:
        raise UsageError(
            f"the published weights of {name} tell {known} classes apart, but the data has {classes}",
            hint="train the model on your data first, and give its weights as --weights",
        )
    return model


LIBRARIES: dict[str, Callable[[str, int | None, bool], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


MAIN = ("logits", "out", "last_hidden_state")
"""What networks of transformers, torchvision's for segmentation and encoders call the output that counts."""


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


STATES = ("state_dict", "model_state_dict", "model")
"""Names that training scripts give the state dict in a checkpoint."""
COUNTER = "num_batches_tracked"
"""Of batch norms; files of old versions of torch lack it, and nothing depends on it."""
CUT_SHORT = re.compile("incomplete|central directory|EOF|header ?too ?small|invalid ?header ?length", re.IGNORECASE)
"""What torch and safetensors say of a file that was cut off."""
REFUSED = re.compile(r"Unsupported (?:global|class|operand)[^.]*?: ?(?:GLOBAL )?([\w.]+)")
"""What torch says of a file that holds more than tensors."""
FEW_NAMES = 4
"""Of a state dict that are looked for in another one, with more in front of them."""
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
    for prefix in _prefixes(state, own):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not _missing(own, inside):
            return inside
    for prefix in _prefixes(own, state):
        if all(key.startswith(prefix) for key in own):
            return {prefix + key: value for key, value in state.items()}
    return state


def _prefixes(outer: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> list[str]:
    """What may stand in front of all names of `inner` to make those of `outer`, the shortest first."""
    found = {key.removesuffix(name) for name in sorted(inner, key=len)[:FEW_NAMES] for key in outer if key.endswith(f".{name}")}
    return sorted(found, key=len)


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
