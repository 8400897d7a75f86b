"""bfloat16 where this processor is faster in it, float32 elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import arithmetic


@pytest.mark.parametrize(("bf16_s", "expected"), [(1.0, torch.bfloat16), (1.95, torch.float32), (3.0, torch.float32)])
def test_autocast_only_where_it_is_clearly_faster(monkeypatch, bf16_s, expected):
    monkeypatch.setattr(arithmetic, "_bf16_faster", {})
    monkeypatch.setattr(arithmetic, "_seconds", lambda dtype, device: bf16_s if dtype is torch.bfloat16 else 2.0)
    with arithmetic.fast_arithmetic(torch.device("cpu")):
        assert nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 8, 8)).dtype == expected


def test_it_is_found_out_once(monkeypatch):
    asked = []
    monkeypatch.setattr(arithmetic, "_bf16_faster", {})
    monkeypatch.setattr(arithmetic, "_seconds", lambda dtype, device: asked.append(dtype) or 1.0)
    for _ in range(3):
        arithmetic.bf16_is_faster(torch.device("cpu"))
    assert len(asked) == 2
