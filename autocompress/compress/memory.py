"""In how many parts a batch is trained on: as many as the memory asks for."""

from __future__ import annotations

import math

import torch
from torch import fx, nn

from autocompress.compress.arithmetic import free_memory
from autocompress.data.splits import FLOAT_BYTES

LEAST_PART, MEMORY_SHARE = 8, 0.5
"""Examples at least of a part of a batch that does not fit the memory; and the share of what is free that it may take."""
NO_MEMORY = "can't allocate memory"
"""What torch says of the machine's own, with no kind of error for it."""


def parts_that_fit(model: nn.Module, batch_size: int, device: torch.device) -> int:
    """In how many parts a batch is to be taken, as far as the shapes of a traced network tell: a process that takes more is killed."""
    needed, free = batch_size * _activation_bytes(model), free_memory(device)
    parts = 1
    while needed / parts > MEMORY_SHARE * free and batch_size >= 2 * parts * LEAST_PART:
        parts *= 2
    return parts


def _activation_bytes(model: nn.Module) -> int:
    """Of what training keeps of an example until its gradient is known: about what all operators make of it; 0 where nothing tells."""
    if not isinstance(model, fx.GraphModule):
        return 0
    shapes = [node.meta["shape"] for node in model.graph.nodes if node.meta.get("shape") and node.op not in ("get_attr", "output")]
    batch = next((shape[0] for shape in shapes), 1)
    return FLOAT_BYTES * sum(map(math.prod, shapes)) // batch


def is_out_of_memory(error: Exception) -> bool:
    """Of the machine or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)
