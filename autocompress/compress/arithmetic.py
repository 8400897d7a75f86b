"""Where training runs, in which arithmetic and on which layout: CUDA when it is there; bfloat16 where this processor is faster in it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.graph.trace import is_opaque
from autocompress.system import machine

_bf16_faster: dict[str, bool] = {}


def best_training_device() -> torch.device:
    """CUDA when it is there, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take there."""
    if device.type == "cuda":  # what torch holds but does not use is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = machine.free_bytes()
    return int(psutil.virtual_memory().available) if free is None else free


def training_hardware() -> str:
    """What students are trained on, in words."""
    return torch.cuda.get_device_name() if best_training_device().type == "cuda" else "CPU"


def fast_arithmetic(device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where that is faster, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_faster(device))


def bf16_is_faster(device: torch.device) -> bool:
    """Whether a convolution runs faster in bfloat16 than in float32 here; measured once a process.

    Processors without bfloat16 instructions emulate it, many times slower.
    """
    if device.type not in _bf16_faster:
        _bf16_faster[device.type] = _seconds(torch.bfloat16, device) < 0.9 * _seconds(torch.float32, device)
    return _bf16_faster[device.type]


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    x = torch.randn(32, 32, 16, 16, device=device)
    weight = torch.randn(32, 32, 3, 3, device=device)
    best = math.inf
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        for _ in range(7):
            start = time.perf_counter()
            float(F.conv2d(x, weight, padding=1).sum())
            best = min(best, time.perf_counter() - start)
    return best


def fast_layout(model: nn.Module) -> torch.memory_format:
    """Channels last where all weights have a form for it: convolutions of images run faster so.

    Not for a network that could not be traced: its code may take views that only contiguous maps have.
    """
    if is_opaque(model):
        return torch.preserve_format
    images = all(p.dim() in (1, 2, 4) for p in model.parameters()) and any(p.dim() == 4 for p in model.parameters())
    return torch.channels_last if images else torch.preserve_format
