"""Modules of torch.nn in place of the functions that torch.export makes of them, under the names that their weights have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.graph.nodes import arguments, name_of, value_of

CONVOLUTION_MODULES: dict[str, tuple[Any, int]] = {"conv1d": (nn.Conv1d, 1), "conv2d": (nn.Conv2d, 2), "conv3d": (nn.Conv3d, 3)}
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the axes of what they normalise."""
COMPUTED = "constant_"
"""How names begin of values that were computed once."""
PRODUCTS = {
    "addmm": {"self": "bias", "mat1": "input", "mat2": "weight"},
    "mm": {"self": "input", "mat2": "weight"},
    "matmul": {"self": "input", "other": "weight"},
}
"""Linear layers that are written as products with a weight of inputs x outputs: their arguments by the names of a layer."""
FUNCTIONAL_NORM = "_native_batch_norm_legit_no_training"
SEVERAL = (FUNCTIONAL_NORM, "adaptive_max_pool2d")
"""Functions that give several tensors, of which the first is the output."""
HELD = ("weight", "bias", "running_mean", "running_var")
"""Arguments that a module holds."""


@dataclass(frozen=True)
class _Call:
    """A function that a module stands for.

    tensors: by the module's own name the value that it holds, and the name that this has in the record. options: what else tells two
    modules of one type apart. home: the name that the module should have.
    """

    node: fx.Node
    make: Callable[[], nn.Module]
    tensors: Mapping[str, tuple[str, Tensor]]
    options: str
    home: str

    @property
    def same_module(self) -> tuple[object, ...]:
        """Equal for calls of one module."""
        return (name_of(self.node), self.options, self.home, tuple(sorted((own, name) for own, (name, _) in self.tensors.items())))


def put_modules_back(recorded: fx.GraphModule, model: nn.Module) -> None:
    """In place: each call of a layer, norm or dropout whose weights nothing else computes with becomes a call of a module."""
    calls = {node: call for node in recorded.graph.nodes if (call := _call(node, recorded, model)) is not None}
    calls = _without_those_that_share(calls)
    left = {
        str(n.target)
        for n in recorded.graph.nodes
        if n.op == "get_attr" and any(user not in calls or n not in _held(user) for user in n.users)
    }
    names = _names(list(calls.values()), left)
    turned: dict[str, nn.Parameter] = {}
    own = dict(model.named_modules())
    for same, call in {call.same_module: call for call in calls.values()}.items():
        recorded.add_submodule(names[same], _holding(call, own.get(names[same]), turned))
    for node, call in calls.items():
        with recorded.graph.inserting_before(node):
            source = _source(node)  # which may have been put back by now
            written = recorded.graph.call_module(names[call.same_module], (source,))
        written.meta = {**node.meta, "is_own": _caller(node, model)[0] == names[call.same_module]}
        node.replace_all_uses_with(written)
        recorded.graph.erase_node(node)
        if name_of(node) in SEVERAL:
            _take_first_of(written)


def _roles(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the names that layers have for them; a weight may be written the other way round."""
    given = arguments(node)
    renamed = PRODUCTS.get(name_of(node), {})
    return {renamed.get(name, name): value for name, value in given.items()}


def _held(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that the module would hold; what it is called on may be one too, as learned queries are."""
    return [given for given in node.all_input_nodes if given.op == "get_attr" and given is not _source(node)]


def _source(node: fx.Node) -> Any:
    """What the module is called on."""
    given = _roles(node)
    return given.get("input", given.get("self"))


def _call(node: fx.Node, recorded: fx.GraphModule, model: nn.Module) -> _Call | None:
    """What a module could stand for; None where a value that it would hold is computed."""
    maker = _MAKERS.get(name_of(node))
    if maker is None:
        return None
    given = _roles(node)
    source = _source(node)
    held = {own: value for own in HELD if isinstance(value := given.get(own), fx.Node)}
    if not isinstance(source, fx.Node) or any(value.op != "get_attr" for value in held.values()):
        return None
    tensors = {own: (str(value.target), value_of(value, recorded)) for own, value in held.items()}
    if any(not own.startswith("running") and not isinstance(value, nn.Parameter) for own, (_, value) in tensors.items()):
        return None  # a filter that is no parameter is not to be trained
    values = {own: value for own, (_, value) in tensors.items()}
    options = {key: value for key, value in given.items() if key not in ("input", "self", *HELD)}
    if any(isinstance(part, fx.Node) for value in options.values() for part in (value if isinstance(value, list) else [value])):
        return None
    make = maker(source, values, options)
    return _Call(node, make, tensors, repr(options), _home(node, tensors, model)) if make is not None else None


# -- one function for each kind of module: what makes it, or None where there is none that does the same --------------------------------

_Values = Mapping[str, Tensor]
_Options = Mapping[str, Any]
_Maker = Callable[[fx.Node, _Values, _Options], Callable[[], nn.Module] | None]


def _convolution(kind: str) -> _Maker:
    layer, dims = CONVOLUTION_MODULES[kind]  # which says that a kernel has one size or two, and takes either

    def maker(source: fx.Node, values: _Values, options: _Options) -> Callable[[], nn.Module] | None:
        weight, groups = values.get("weight"), options["groups"]
        if weight is None or source.meta["val"].dim() != dims + 2:
            return None

        def each(value: Any) -> Any:
            return tuple(value * dims if len(value) == 1 else value) if isinstance(value, (list, tuple)) else value

        padding = options["padding"]
        return lambda: layer(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), each(options["stride"]),
            padding if isinstance(padding, str) else each(padding), each(options["dilation"]), groups, "bias" in values, device="meta",
        )  # fmt: skip

    return maker


def _linear(_: fx.Node, values: _Values, __: _Options) -> Callable[[], nn.Module] | None:
    weight = values.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    return lambda: nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in values, device="meta")


def _product(source: fx.Node, values: _Values, options: _Options) -> Callable[[], nn.Module] | None:
    weight, bias = values.get("weight"), values.get("bias")
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or any(value != 1 for value in options.values()):
        return None
    if source.meta["val"].dim() < 2 or (bias is not None and bias.shape != weight.shape[1:]):
        return None
    return lambda: nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")


def _batch_norm(source: fx.Node, values: _Values, options: _Options) -> Callable[[], nn.Module] | None:
    tracks, affine, dims = "running_mean" in values, "weight" in values, source.meta["val"].dim()
    if options.get("training", False) is tracks or affine is not ("bias" in values) or dims not in BATCH_NORMS:
        return None
    channels = source.meta["val"].shape[1]
    return lambda: BATCH_NORMS[dims](
        int(channels), eps=options["eps"], momentum=options["momentum"], affine=affine, track_running_stats=tracks, device="meta"
    )


def _layer_norm(_: fx.Node, values: _Values, options: _Options) -> Callable[[], nn.Module] | None:
    if "bias" in values and "weight" not in values:
        return None
    shape, affine = tuple(options["normalized_shape"]), "weight" in values
    return lambda: nn.LayerNorm(shape, options["eps"], elementwise_affine=affine, bias="bias" in values, device="meta")


def _group_norm(source: fx.Node, values: _Values, options: _Options) -> Callable[[], nn.Module] | None:
    if ("weight" in values) is not ("bias" in values):
        return None
    channels = int(source.meta["val"].shape[1])
    return lambda: nn.GroupNorm(options["num_groups"], channels, options["eps"], affine="weight" in values, device="meta")


def _adaptive_max_pool(_: fx.Node, __: _Values, options: _Options) -> Callable[[], nn.Module] | None:
    return lambda: nn.AdaptiveMaxPool2d(tuple(options["output_size"]))


def _dropout(module: type[nn.Module]) -> _Maker:
    return lambda _, __, options: lambda: module(options["p"])


_MAKERS: dict[str, _Maker] = {
    **{kind: _convolution(kind) for kind in CONVOLUTION_MODULES}, "linear": _linear, **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(("batch_norm", FUNCTIONAL_NORM), _batch_norm), "layer_norm": _layer_norm, "group_norm": _group_norm,
    "dropout": _dropout(nn.Dropout), "feature_dropout": _dropout(nn.Dropout2d), "adaptive_max_pool2d": _adaptive_max_pool,
}  # fmt: skip


# -- which modules, and where -----------------------------------------------------------------------------------------------------


def _without_those_that_share(calls: dict[fx.Node, _Call]) -> dict[fx.Node, _Call]:
    """Only calls whose weights nothing but such calls reads: what else computes with a weight would miss its changes.

    Nor may one read it the other way round.
    """
    straight = {held for node in calls if name_of(node) not in PRODUCTS for held in _held(node)}
    calls = {node: call for node, call in calls.items() if name_of(node) not in PRODUCTS or straight.isdisjoint(_held(node))}
    while True:
        held = {value for node in calls for value in _held(node)}
        read_elsewhere = {value for value in held if any(user not in calls or value not in _held(user) for user in value.users)}
        left = {node: call for node, call in calls.items() if read_elsewhere.isdisjoint(_held(node))}
        if len(left) == len(calls):
            return left
        calls = left


def _names(calls: list[_Call], left: set[str]) -> dict[tuple[object, ...], str]:
    """A name for each module, no name inside another, nor in place of what holds parameters that are `left`."""
    names: dict[tuple[object, ...], str] = {}
    given: set[str] = set()
    taken: set[str] = set()
    holding = {prefix for name in left for prefix in _prefixes(name)[:-1]}
    for call in calls:
        if call.same_module not in names:
            inside = not given.isdisjoint(_prefixes(call.home)[:-1])
            wanted = f"{call.home}.{name_of(call.node)}" if call.home in holding else call.home.replace(".", "_") if inside else call.home
            name = names[call.same_module] = _free(wanted, taken)
            given.add(name)
            taken.update(_prefixes(name))
    return names


def _home(node: fx.Node, tensors: Mapping[str, tuple[str, Tensor]], model: nn.Module) -> str:
    """The path of the module whose weight this is; else of the one whose code calls the function, or a name inside of it."""
    path, owner = _caller(node, model)
    kind = name_of(node).strip("_")
    if "weight" in tensors:
        name, weight = tensors["weight"]
        own, computed = getattr(owner, "weight", None), name.startswith(COMPUTED)
        if name_of(node) in PRODUCTS:  # whose weight is held the other way round
            return f"{name.removesuffix('weight')}linear" if name.endswith(".weight") or name == "weight" else f"{name}_linear"
        if own is weight or (computed and isinstance(own, Tensor)):
            return path or kind
        if name.endswith("weight") and not computed:
            return name.removesuffix("weight").rstrip("._") or kind
    is_module = type(owner).__module__.startswith("torch.nn") and not list(owner.children())
    return path if path and is_module else f"{path}.{kind}".lstrip(".")


def _caller(node: fx.Node, model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost module of the network whose code calls the function."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        try:
            return path, model.get_submodule(path)
        except (AttributeError, TypeError):  # a slice of a Sequential, made for one call
            continue
    return "", model


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _free(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _holding(call: _Call, original: nn.Module | None, turned: dict[str, nn.Parameter]) -> nn.Module:
    """The module with the network's own tensors.

    Args:
        original: the network's module of this name. turned: weights that are held the other way round, each once; more may be added.
    """
    module = call.make()
    for own, (path, value) in call.tensors.items():
        is_turned = own == "weight" and name_of(call.node) in PRODUCTS
        setattr(module, own, turned.setdefault(path, nn.Parameter(value.detach().t().contiguous())) if is_turned else value)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
        counted = getattr(original, "num_batches_tracked", None)
        module.num_batches_tracked = counted if isinstance(counted, Tensor) else torch.zeros((), dtype=torch.long)
        module.momentum = getattr(original, "momentum", module.momentum)  # None, an even average, is recorded as 0
    return module.eval()


def _take_first_of(node: fx.Node) -> None:
    """Some functions give more than the output, as a functional norm does, which modules do not."""
    for user in [user for user in node.users if name_of(user) == "getitem"]:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
