"""How many inputs are trained on at once, or answered: as many as the memory bears."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator

import torch
from torch import fx, nn

from autocompress.compress.arithmetic import best_training_device, free_memory
from autocompress.data.splits import FLOAT_BYTES
from autocompress.system import machine

LEAST_PART, MEMORY_SHARE = 8, 0.5
"""Examples at least of a part of a batch that does not fit the memory; and the share of what is free that it may take."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
"""What torch and its libraries say of the machine's own, with no kind of error for it."""
MOST_TAKEN = 0.9
"""Share of what is free that this process may take: the system kills who takes more than there is, and asks nobody."""


def parts_that_fit(model: nn.Module, batch_size: int, device: torch.device) -> int:
    """In how many parts a batch is to be taken, as far as the shapes of a traced network tell: a process that takes more is killed."""
    needed, free = batch_size * _activation_bytes(model), free_memory(device)
    parts = 1
    while needed / parts > MEMORY_SHARE * free and batch_size >= 2 * parts * LEAST_PART:
        parts *= 2
    return parts


def inputs_that_fit(model: nn.Module, most: int, device: torch.device) -> int:
    """How many inputs, up to `most`, a network answers at once, as far as its shapes tell."""
    needed = peak_bytes(model)
    return max(1, min(most, int(MEMORY_SHARE * free_memory(device) / needed))) if needed else most


def peak_bytes(model: nn.Module) -> int:
    """Of the values that a network which answers one input holds at once, at most: each from where it is made to its last reader.

    0 where no shapes tell.
    """
    if not isinstance(model, fx.GraphModule):
        return 0
    values = [node for node in model.graph.nodes if node.meta.get("shape") and node.op not in ("get_attr", "output")]
    sizes = {node: FLOAT_BYTES * math.prod(node.meta["shape"]) for node in values}
    batch = next((node.meta["shape"][0] for node in sizes), 1)
    order = {node: position for position, node in enumerate(model.graph.nodes)}
    ends = {node: max((order[user] for user in node.users), default=order[node]) for node in sizes}
    held, most = 0, 0
    for node, position in order.items():
        held += sizes.get(node, 0)
        most = max(most, held)
        held -= sum(sizes[read] for read in {*node.all_input_nodes, node} & sizes.keys() if ends[read] == position)
    return most // batch


def _activation_bytes(model: nn.Module) -> int:
    """Of what training keeps of an example until its gradient is known: about what all operators make of it; 0 where nothing tells."""
    if not isinstance(model, fx.GraphModule):
        return 0
    shapes = [node.meta["shape"] for node in model.graph.nodes if node.meta.get("shape") and node.op not in ("get_attr", "output")]
    batch = next((shape[0] for shape in shapes), 1)
    return FLOAT_BYTES * sum(map(math.prod, shapes)) // batch


def is_out_of_memory(error: Exception) -> bool:
    """Of the machine or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(said in str(error) for said in NO_MEMORY)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within it, whoever asks for more memory than MOST_TAKEN allows gets an error, which ends one policy, or halves a batch.

    On Linux, and where the machine's own memory is what training takes.
    """
    held, device = machine.held_bytes(), best_training_device()
    if held is None or device.type != "cpu":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + int(MOST_TAKEN * free_memory(device))
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
