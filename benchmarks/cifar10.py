"""CIFAR-10 and its pretrained ResNets as they lie in AUTOCOMPRESS_DATA, for the benchmarks and the tests that need real data.

`data` and `resnet56` are references for a task: `--data benchmarks/cifar10.py:data --model benchmarks/cifar10.py:resnet56`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from autocompress import Data, Split
from autocompress.data import IMAGENET_MEAN, IMAGENET_STD, stratified
from autocompress.testing.models import CifarResNet

TILE, COLUMNS, ROWS = 32, 100, 50
MOSAICS = {"train": 10, "test": 2}
VAL_FRACTION = 0.1


def folder() -> Path:
    """Where the data sets lie."""
    return Path(os.environ.get("AUTOCOMPRESS_DATA", "../shared/data"))


def _split(name: str) -> Split:
    """All images of a split, n x 3 x 32 x 32 uint8, in the original order."""
    root = folder() / "cifar10"
    tiles = [
        np.asarray(Image.open(root / f"cifar10_{name}_{index:02d}.webp").convert("RGB"))
        .reshape(ROWS, TILE, COLUMNS, TILE, 3)
        .transpose(0, 2, 4, 1, 3)
        .reshape(-1, 3, TILE, TILE)
        for index in range(MOSAICS[name])
    ]
    labels = np.load(root / f"cifar10_{name}_labels.npy").astype(np.int64)
    return Split(torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(labels))


def data() -> Data:
    """45,000 images to train on, 5,000 to validate, the 10,000 of the test set untouched; normalised as the teachers expect."""
    whole = _split("train")
    rest, val = stratified(whole.targets, VAL_FRACTION)
    return Data(whole[rest], whole[val], _split("test"), classes=10, mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=True, shift=4)


def resnet20() -> nn.Module:
    """ResNet-20 for 32 x 32 images with zero-padded shortcuts (272 k parameters)."""
    return CifarResNet(3)


def resnet56() -> nn.Module:
    """ResNet-56 for 32 x 32 images with zero-padded shortcuts (853 k parameters)."""
    return CifarResNet(9)
