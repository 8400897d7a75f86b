"""What a traced network is made of, as far as a policy can change it; and what a policy makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autocompress.policy import Criterion


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be removed or added one by one, in all tensors that share them.

    stream: a residual stream, that is, the channels pass through an addition.
    growable: whether channels can be added without a change to what the network computes.
    unit: how many channels of a layer are one here, since they go together: those of an attention head, or of a group of filters.
    producers, consumers: names of the layers that write and read them.
    """

    name: str
    size: int
    prunable: bool
    reason: str
    growable: bool
    unit: int
    stream: bool
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A residual branch that can be dropped; `stream` is the channel group that it adds to."""

    name: str
    stream: str | None
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    group: the channel group that it was first to write, if that may change.
    factorable: whether two layers of lower rank can stand for it.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    params: int
    group: str | None
    factorable: bool


@dataclass(frozen=True)
class Frozen:
    """A part that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """The network that a policy makes, however the policy is spelt: what decides its latency, its size and whether it was tried before.

    channels, ranks, bits: of the channel groups, factorised layers and layers that are left, in their order. criterion: by which channels
    were chosen, where some were.
    """

    reference: str | None
    dropped: tuple[str, ...]
    channels: tuple[tuple[str, int], ...]
    ranks: tuple[tuple[str, int], ...]
    bits: tuple[tuple[str, int], ...]
    reduced_range: bool
    criterion: Criterion = "l2"

    @property
    def shape(self) -> tuple[object, ...]:
        """The structure in whatever number of bits."""
        return self.reference, self.dropped, self.channels, self.ranks

    @property
    def timed(self) -> Structure:
        """What decides its latency: whichever channels stay, they take as long."""
        return self if self.criterion == "l2" else replace(self, criterion="l2")
