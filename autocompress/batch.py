"""What a network is given at once: one tensor, or several where it has several inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One tensor for each input of a network, all with a row for each example; it is cut, copied and moved like one of them.

    names: of the network's arguments that the tensors are for; empty: they are for the first ones, in their order.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len({len(tensor) for tensor in self.tensors}) == 1, "a row for each example"
        assert len(self.names) in (0, len(self.tensors))

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return self.map(lambda tensor: tensor[rows])

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of `size` rows; the last one may be smaller."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device, *, copy: bool = False) -> Batch:
        """Each tensor as `Tensor.to` gives it."""
        return self.map(lambda tensor: tensor.to(device, copy=copy))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed."""
        return Batch(tuple(map(change, self.tensors)), self.names)


Inputs = Tensor | Batch


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """What a network is called with."""
    return inputs.tensors if isinstance(inputs, Batch) else (inputs,)


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """Of the arguments that they are for, where they are named."""
    return inputs.names if isinstance(inputs, Batch) else ()


def map_inputs(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same with every tensor changed."""
    return inputs.map(change) if isinstance(inputs, Batch) else change(inputs)


def call_network(network: nn.Module, inputs: Inputs) -> Any:
    """What a network makes of the inputs."""
    return network(*tensors_of(inputs))


def joined(parts: Sequence[Inputs]) -> Inputs:
    """One below the other; at least one."""
    columns = zip(*map(tensors_of, parts), strict=True)
    tensors = tuple(torch.cat(column) for column in columns)
    return Batch(tensors, names_of(parts[0])) if isinstance(parts[0], Batch) else tensors[0]


def random_like(inputs: Inputs, n: int | None = None) -> Inputs:
    """`n` random examples of the same kind, by default as many, the same at every call; whole numbers are 0 and 1, as every table has."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        sizes = (len(tensor) if n is None else n, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(sizes, generator=generator, dtype=tensor.dtype)
        return torch.randint(0, 2, sizes, generator=generator).to(tensor.dtype)

    return map_inputs(drawn, inputs)
