"""A network as `torch.export` writes it down, with its layers and norms put back as modules of torch.nn.

Export calls the network's code once and records the operators of ATen that it calls: what the code computes from shapes becomes constants,
but for the size of the batch. Then, in place on the record: what depends on no input is computed once, what overwrites a tensor becomes
what makes a new one, and layers become modules again (see `modules`), so that they can be resized, rounded and trained.
"""

from __future__ import annotations

import gc
import operator
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autocompress.graph.modules import COMPUTED, put_modules_back
from autocompress.graph.nodes import RECURRENT, arguments, drop_unread, is_leaf, is_norm, name_of, slice_bounds, value_of
from autocompress.system.quick import quick_trace
from autocompress.system.quiet import quiet

TORCH = Path(torch.__file__).parent
DATA_DEPENDENT = "branch"
"""Where a traced network keeps the place in the code where the values of the example have decided which operators it calls."""
ONE_NUMBER = "its code is for one number of inputs"
FACTORIES = {"zeros": "new_zeros", "ones": "new_ones", "full": "new_full", "empty": "new_empty"}
"""What makes a tensor of a given size, and what makes it with the type and on the device of another tensor."""
ELSEWHERE = ("arange", "eye", "linspace", "rand", "randn")
"""What makes a tensor where export ran, and has no form that makes it where another one is."""
HEADS = 4
"""Axes of attention as it is exported: batch x heads x tokens x size."""
COPIES = ("clone", "contiguous", "alias", "lift_fresh_copy")
WEIGHTS = ("weight", "bias")
RESHAPE, LIKE = torch.ops.aten.reshape.default, torch.ops.aten.reshape_as.default
VIEWS = {torch.ops.aten.view.default: RESHAPE, torch.ops.aten._unsafe_view.default: RESHAPE, torch.ops.aten.view_as.default: LIKE}
"""Training keeps images channels last, and no view flattens such a map: the operator that copies where it must stands in."""


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """On the device of another tensor."""
    return tensor.to(other.device)


def exported(model: nn.Module, example: tuple[Tensor, ...]) -> fx.GraphModule:
    """The network's operators, with modules in place of those that a module of torch.nn stands for.

    `model` must be the caller's own copy, in eval mode; the result shares its parameters. Raises what export or the model's own code raise,
    and ValueError for code that is for one number of inputs only.
    """
    for parameter in model.parameters():  # without gradients torch's attention calls operators that no runtime knows
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    with quiet(), torch.enable_grad():
        several = tuple(_several(tensor) for tensor in example)
        program, branch = _recorded(model, several)
        if _takes_any_number(program):
            recorded = _as_module(program)
        else:
            more = tuple(torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor for tensor in several)
            few, many = (_as_module(_recorded(model, batches, any_number=False)[0]) for batches in (several, more))
            recorded = _for_any_number(few, many, next(len(tensor) for tensor in several if tensor.dim()))
    _compute_constants(recorded)
    _put_out_of_place(recorded.graph)
    _leave_out_copies(recorded.graph)
    _repeat_heads(recorded.graph)
    _write_attention_out(recorded.graph)
    put_modules_back(recorded, model)
    module = _tidy(recorded, model)
    module.meta[DATA_DEPENDENT] = branch
    return module


def _recorded(model: nn.Module, batches: tuple[Tensor, ...], *, any_number: bool = True) -> tuple[torch.export.ExportedProgram, str]:
    """The operators that the code calls, and where it has chosen them by the values of the example, if it has.

    any_number: of inputs, as far as the code allows it; else the sizes of the batches are numbers in the record.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # a slow import, which export does anyway

    free = tuple({0: torch.export.Dim.AUTO} if tensor.dim() and any_number else {} for tensor in batches)
    try:
        with quick_trace():
            return torch.export.export(model, batches, dynamic_shapes=free, strict=False), ""
    except GuardOnDataDependentSymNode as error:
        program = torch.export.draft_export(model, batches, dynamic_shapes=free, strict=False)
        gc.collect()  # of the files that it leaves open, while nobody listens
        return program, _place(str(error)) or "somewhere"


def _as_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The record as a module, in which nothing is overwritten that is read by another name."""
    recorded = _plain_module(program)
    if _writes_what_others_see(recorded.graph) or any(map(_is_region, recorded.graph.nodes)):
        recorded = _plain_module(program.run_decompositions({}))  # not always: it takes torch several times as long
    return recorded


def _is_region(node: fx.Node) -> bool:
    """Whether a part of the code is one operator of the record, as `with torch.no_grad()` makes it."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _plain_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    recorded = program.module(check_guards=False)
    assert isinstance(recorded, fx.GraphModule)
    _take_outputs_as_they_are(recorded)
    _make_tensors_where_the_input_is(recorded.graph)
    return recorded


def _takes_any_number(program: torch.export.ExportedProgram) -> bool:
    """Whether the record is for any number of inputs. `len(x)` and `int(x.shape[0])` make a number of it, which export does not say."""
    named = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in named]
    first = [size for value in inputs if isinstance(value, Tensor) for size in value.shape[:1]]
    return bool(first) and all(isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None for size in first)


def _for_any_number(few: fx.GraphModule, many: fx.GraphModule, n: int) -> fx.GraphModule:
    """Of two records of one network, for `n` and for n + 1 inputs, the first, in place, for any number.

    Numbers in proportion to that of the inputs become its multiples. Raises ValueError where the records differ in anything else, as those
    of code that calls operators for each input do.
    """
    pairs = list(zip(few.graph.nodes, many.graph.nodes, strict=False))
    twins = {other: node for node, other in pairs}
    if len(few.graph.nodes) != len(many.graph.nodes) or any(not _is_same_call(*pair, few, many) for pair in pairs):
        raise ValueError(ONE_NUMBER)
    source = next(node for node in few.graph.nodes if node.op == "placeholder" and node.meta["val"].dim())
    with few.graph.inserting_after(source):
        count = few.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))

    def either(node: fx.Node, own: Any, other: Any) -> Any:
        if twins.get(other, other) == own if isinstance(other, fx.Node) else own == other:
            return own
        if not (isinstance(own, int) and isinstance(other, int)) or own % n or other != own // n * (n + 1):
            raise ValueError(ONE_NUMBER)
        if own == n:
            return count
        with few.graph.inserting_before(node):
            return few.graph.call_function(operator.mul, (count, own // n))

    for node, other in pairs:
        (values, form), (others, same) = (pytree.tree_flatten((each.args, each.kwargs)) for each in (node, other))
        if form != same:
            raise ValueError(ONE_NUMBER)
        node.args, node.kwargs = pytree.tree_unflatten([either(node, *pair) for pair in zip(values, others, strict=True)], form)
    return few


def _is_same_call(node: fx.Node, other: fx.Node, few: fx.GraphModule, many: fx.GraphModule) -> bool:
    if (node.op, node.target) != (other.op, other.target):
        return False
    own, others = (value_of(each, module) if each.op == "get_attr" else None for each, module in ((node, few), (other, many)))
    return torch.equal(own, others) if isinstance(own, Tensor) and isinstance(others, Tensor) else own is others


def _several(tensor: Tensor) -> Tensor:
    """More than one input: export takes it for granted that there is one where there is one."""
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor.clone()


def _take_outputs_as_they_are(recorded: fx.GraphModule) -> None:
    """As the network gives them, in plain containers, without export's own wrapping; no checks of what was exported."""
    graph = recorded.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "_assert" in name_of(node):
            graph.erase_node(node)
    output, spec = next(node for node in graph.nodes if node.op == "output"), recorded._out_spec
    assert spec is not None
    flat = pytree.tree_leaves(output.args, is_leaf=lambda value: value is None)
    output.args = (_plain(pytree.tree_unflatten(flat, spec)),)
    graph.set_codegen(fx.graph.CodeGen())


def _plain(value: Any) -> Any:
    """Dicts, lists and tuples in place of what is derived from them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(part) for part in value)
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _make_tensors_where_the_input_is(graph: fx.Graph) -> None:
    """What is as large as the batch is made on its device, wherever export ran; what has one size for all is made of nothing."""
    like = next((node for node in graph.nodes if node.op == "placeholder"), None)
    for node in list(graph.nodes):
        name = name_of(node)
        given = arguments(node)
        if name in ("to", "_to_copy") and given.get("device") is not None:
            node.target = torch.ops.aten.to.dtype
            node.args, node.kwargs = (node.all_input_nodes[0], node.meta["val"].dtype), {}
        elif name in ELSEWHERE and node.all_input_nodes and like is not None:
            with graph.inserting_after(node):
                there = graph.call_function(beside, (node, like))
            there.meta = dict(node.meta)
            node.replace_all_uses_with(there, delete_user_cb=lambda user, made=there: user is not made)
        elif "device" in node.kwargs and name not in FACTORIES:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
        if name in FACTORIES and node.all_input_nodes and like is not None:
            node.target = getattr(torch.ops.aten, FACTORIES[name]).default
            node.args = (like, *node.args)
            node.kwargs = {"dtype": node.meta["val"].dtype}
        elif name in FACTORIES.values() and node.all_input_nodes == [given["self"]]:
            node.target = getattr(torch.ops.aten, name.removeprefix("new_")).default
            node.args = node.args[1:]
            node.kwargs = {"dtype": node.meta["val"].dtype}


# -- what depends on no input ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compute_constants(recorded: fx.GraphModule) -> None:
    """Values that are the same for every input become buffers; weights that are computed at every call, weights.

    What else is made of parameters stays as it is, so that it can be trained.
    """
    fixed = _fixed(recorded.graph)
    trained = _made_of_parameters(recorded, fixed)
    alone = _made_of_nothing_else(recorded.graph, trained)
    values = _computed(recorded, fixed)
    for number, node in enumerate(values):
        readers = [user for user in node.users if user not in values and (node not in trained or (_weighs(node, user) and node in alone))]
        value = values[node]
        if not readers or not isinstance(value, Tensor):
            continue
        name = f"{COMPUTED}{number}"
        setattr(recorded, name, nn.Parameter(value)) if node in trained else recorded.register_buffer(name, value)
        with recorded.graph.inserting_before(node):
            constant = recorded.graph.get_attr(name)
        constant.meta = dict(node.meta)
        for reader in readers:
            reader.replace_input_with(node, constant)
    drop_unread(recorded.graph)


def _fixed(graph: fx.Graph) -> list[fx.Node]:
    """Operators that depend on no input, and draw no random numbers."""
    fixed: dict[fx.Node, None] = {}
    for node in graph.nodes:
        draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_plain = node.op == "call_function" and not draws and not _is_region(node)
        if is_plain and all(n in fixed or n.op == "get_attr" for n in node.all_input_nodes):
            fixed[node] = None
    return list(fixed)


def _made_of_parameters(recorded: fx.GraphModule, fixed: list[fx.Node]) -> set[fx.Node]:
    made: set[fx.Node] = set()
    for node in fixed:
        sources = node.all_input_nodes
        if any(n in made or (n.op == "get_attr" and isinstance(value_of(n, recorded), nn.Parameter)) for n in sources):
            made.add(node)
    return made


def _made_of_nothing_else(graph: fx.Graph, trained: set[fx.Node]) -> set[fx.Node]:
    """Those whose parameters nobody reads but to make them: as weights of their own they are tied to nothing."""
    tied = {node for node in graph.nodes if node.op == "get_attr" and any(user not in trained for user in node.users)}
    alone: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node in trained and tied.isdisjoint(sources) and all(n in alone for n in sources if n in trained):
            alone.add(node)
    return alone


def _computed(recorded: fx.GraphModule, fixed: list[fx.Node]) -> dict[fx.Node, Any]:
    """Values of operators, in order, since one may overwrite what others read; what the network holds stays as it is."""
    interpreter = fx.Interpreter(recorded, garbage_collect_values=False)
    for source in {source for node in fixed for source in node.all_input_nodes if source.op == "get_attr"}:
        interpreter.env[source] = value_of(source, recorded).detach().clone()
    for node in fixed:
        interpreter.env[node] = interpreter.run_node(node)
    return {node: _own(interpreter.env[node]) for node in fixed}


def _own(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _weighs(node: fx.Node, user: fx.Node) -> bool:
    """Whether the user is a layer that takes this as its weight or bias."""
    given = arguments(user)
    return any(given.get(role) is node for role in WEIGHTS)


# -- what overwrites a tensor ---------------------------------------------------------------------------------------------------


def _put_out_of_place(graph: fx.Graph) -> None:
    """What overwrites its first input makes a tensor instead, which is read by whoever read the input afterwards; views are copies."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node, position in order.items():
        if node.target in VIEWS:
            node.target = VIEWS[node.target]
        target = _out_of_place(node)
        if target is None:
            continue
        node.target, overwritten = target, node.args[0]
        assert isinstance(overwritten, fx.Node)
        for reader in list(overwritten.users):
            if order[reader] > position:
                reader.replace_input_with(overwritten, node)


def _leave_out_copies(graph: fx.Graph) -> None:
    """Where nothing is overwritten any more, a copy is what it copies."""
    for node in graph.nodes:
        if _does_nothing(node):
            node.replace_all_uses_with(node.all_input_nodes[0])


def _write_attention_out(graph: fx.Graph) -> None:
    """Attention over more axes than batch, heads, tokens and size is one operator of torch's, but none that is exported to ONNX."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        given = arguments(node)
        plain = not given.get("is_causal") and given.get("attn_mask") is None
        if name_of(node) != "scaled_dot_product_attention" or not plain or node.meta["val"].dim() <= HEADS:
            continue
        query, key, value = (given[name] for name in ("query", "key", "value"))
        scale = given["scale"] or query.meta["val"].shape[-1] ** -0.5
        with graph.inserting_before(node):
            scores = graph.call_function(aten.matmul.default, (query, graph.call_function(aten.transpose.int, (key, -2, -1))))
            shares = graph.call_function(aten.softmax.int, (graph.call_function(aten.mul.Tensor, (scores, float(scale))), -1))
            written = graph.call_function(aten.matmul.default, (shares, value))
        written.meta = dict(node.meta)
        node.replace_all_uses_with(written)


def _repeat_heads(graph: fx.Graph) -> None:
    """Keys and values that serve several heads each (grouped queries: Ainslie et al. 2023, arXiv 2305.13245) are repeated for them."""
    repeat = torch.ops.aten.repeat_interleave.self_int
    for node in list(graph.nodes):
        given = arguments(node)
        if not given.get("enable_gqa"):
            continue
        for name in ("key", "value"):
            times = int(given["query"].meta["val"].shape[-3]) // int(given[name].meta["val"].shape[-3])
            with graph.inserting_before(node):
                given[name] = graph.call_function(repeat, (given[name], times, -3)) if times > 1 else given[name]
        given["enable_gqa"] = False
        node.args, node.kwargs = (given.pop("query"), given.pop("key"), given.pop("value")), given


def _writes_what_others_see(graph: fx.Graph) -> bool:
    """Whether a tensor is overwritten that is read afterwards by another name, made before: as a view, or as what it is a view of.

    `y = x.flatten(); x.add_(1); use(y)` does so. `x.add_(1).relu_(); use(x)` does not: what overwrites a tensor gives the same one.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    fixed = set(_fixed(graph))
    memory: dict[fx.Node, list[fx.Node]] = {}
    tensor: dict[fx.Node, fx.Node] = {}
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in order:
        source = next(iter(node.all_input_nodes), None)
        shares = name_of(node) == "getitem" or any(value.alias_info is not None for value in _returns(node))
        memory[node] = memory[source] if shares and source is not None else []
        memory[node].append(node)
        tensor[node] = node
        if source is not None and _out_of_place(node) is not None:
            tensor[node] = tensor[source]
            writes.append((source, node))
    return any(
        tensor[other] is not tensor[target] and order[other] < order[write] and any(order[user] > order[write] for user in other.users)
        for target, write in writes
        if not _is_constant_by_then(memory[target], fixed, order)
        for other in memory[target]
    )


def _is_constant_by_then(memory: list[fx.Node], fixed: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether what these share is computed once, before anything reads it that depends on an input."""
    last = max(order[node] for node in memory)
    return fixed.issuperset(memory) and all(user in fixed or order[user] > last for node in memory for user in node.users)


def _returns(node: fx.Node) -> list[torch.Argument]:
    return node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []


def _does_nothing(node: fx.Node) -> bool:
    """A slice may take everything."""
    return name_of(node) in COPIES or (name_of(node) == "slice" and slice_bounds(node, sys.maxsize) == (0, sys.maxsize))


def _out_of_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that makes what this one overwrites its first input with; None where it overwrites nothing."""
    name = name_of(node)
    if not isinstance(node.target, torch._ops.OpOverload) or not name.endswith("_") or name.startswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), node.target._overloadname, None)


def _tidy(recorded: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """With nothing but what is read, and only that saved which the network saves."""
    drop_unread(recorded.graph)
    recorded.graph.lint()
    module = fx.GraphModule(recorded, recorded.graph)
    save_only(module, model.state_dict().keys())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for node in module.graph.nodes:
        if name_of(node) in RECURRENT:  # a GPU goes back only through what runs as in training
            node.args = tuple({"train": True, "dropout": 0.0}.get(key, value) for key, value in arguments(node).items())
            node.kwargs = {}
        elif arguments(node).get("sparse"):  # its gradients no optimizer of ours takes
            given = arguments(node) | {"sparse": False}
            node.args, node.kwargs = tuple(given[argument.name] for argument in node.target._schema.arguments), {}
        owner = _owner(str(node.target), model) if node.op == "get_attr" and node.target in parameters else None
        line, own = _place(str(node.meta.get("stack_trace"))), node.meta.get("is_own", False)
        node.meta = {"line": line, "owner": owner, "is_own": own}
    return module.eval()


def save_only(module: nn.Module, kept: Collection[str]) -> None:
    """Other buffers are left out of the module's state."""
    for name, buffer in list(module.named_buffers()):
        if name not in kept:
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner).register_buffer(own, buffer, persistent=False)


def _owner(name: str, model: nn.Module) -> tuple[str, str] | None:
    """Path and type of the module of torch.nn that holds a parameter; None for a norm, and where the network's own code holds it."""
    path = name.rpartition(".")[0]
    owner = model.get_submodule(path)
    return (path, type(owner).__name__) if is_leaf(owner) and not is_norm(owner) else None


def _place(stack: str) -> str:
    """The innermost line of a stack of calls that is not torch's own, as file.py:line; empty where there is none."""
    places = re.findall(r'File "([^"]+)", line (\d+)', stack)
    own = [place for place in places if not Path(place[0]).is_relative_to(TORCH)] or places
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
