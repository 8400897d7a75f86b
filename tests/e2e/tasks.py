"""Small tasks for whole searches: a network, data that it can learn, devices and progress that remember what was asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from autocompress.data import Data, Split
from autocompress.errors import PolicyFailure
from autocompress.records import Measurement
from autocompress.system.progress import Status
from autocompress.testing.devices import Costs, FakeDevice
from autocompress.testing.models import OptionABlock

CLASSES, SIZE = 4, 8
SLOW_CALLS = Costs(call=5e-6, node=1e-6, mac=2e-9, mac_int8=1e-9)
"""Arithmetic costs most, so that policies spread over the latencies."""


class Net(nn.Module):
    """Two residual blocks on 3 x 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.a, self.b = OptionABlock(8, 8, 1), OptionABlock(8, 16, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(torch.relu(self.bn(self.conv(x))))).mean((2, 3)))


def blobs(n: int = 256, held_out: int = 64, *, test: type[Split] = Split) -> Data:
    """Noisy images of a few classes: one mean image a class."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)

    def split(size: int, kind: type[Split] = Split) -> Split:
        targets = torch.arange(size) % CLASSES
        return kind(means[targets] + 0.8 * torch.randn(size, 3, SIZE, SIZE, generator=generator), targets)

    return Data(split(n), split(held_out), split(held_out, test), classes=CLASSES)


def trained_net(data: Data) -> nn.Module:
    """The network after a few epochs: enough to have something to tell a student."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for start in range(0, len(data.train), 32):
            part = data.train[slice(start, start + 32)]
            loss = nn.functional.cross_entropy(net(part.inputs), part.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


class BrokenDevice(FakeDevice):
    """Cannot run the files of some policies, named by the number of their trial; `None` breaks all of them."""

    def __init__(self, broken: Sequence[str] | None) -> None:
        super().__init__()
        self.broken = broken

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        name = paths[-1].parent.name
        if name.isdigit() and (self.broken is None or name in self.broken):
            raise PolicyFailure("the device is on fire") from RuntimeError("smoke")
        return super().measure(paths, seconds_each=seconds_each)


class Diary:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.messages: list[str] = []
        self.best = ""

    def update(self, status: Status) -> None:
        self.best = status.best
        if not self.phases or self.phases[-1] != status.phase:
            self.phases.append(status.phase)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __enter__(self) -> Diary:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""
