"""The embedded demonstration: read a form of 32 handwritten digits, with a residual network trained on the spot.

Nothing is downloaded: the 1,797 digits (8 x 8 pixels) come with scikit-learn.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = {"teacher": (64, 128, 192), "teacher_80": (80, 160, 240), "teacher_96": (96, 192, 288), "teacher_128": (128, 256, 384)}
"""Of the stages, by the name of the function that makes the network, the narrowest first."""
BLOCKS = (3, 3, 3)
TEACHER_EPOCHS = 12
LEARNING_RATE = 0.05
BATCH_SIZE = 128


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, arXiv 1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitReader(nn.Module):
    """n x 1 x 8 x 8 grey images in [0, 1] -> n x 10 logits."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages: list[nn.Module] = []
        inputs = widths[0]
        for index, (width, blocks) in enumerate(zip(widths, BLOCKS, strict=True)):
            layers = [ResidualBlock(inputs if b == 0 else width, width, 2 if index and b == 0 else 1) for b in range(blocks)]
            stages.append(nn.Sequential(*layers))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def teacher() -> nn.Module:
    """The untrained demonstration network; the search trains it before it begins."""
    return DigitReader(WIDTHS["teacher"])


def teacher_80() -> nn.Module:
    """The same, wider, for a processor that is faster."""
    return DigitReader(WIDTHS["teacher_80"])


def teacher_96() -> nn.Module:
    """Wider still."""
    return DigitReader(WIDTHS["teacher_96"])


def teacher_128() -> nn.Module:
    """The widest."""
    return DigitReader(WIDTHS["teacher_128"])
