"""The weights of a network as the bytes of a safetensors file."""

from __future__ import annotations

from safetensors.torch import save
from torch import nn

from autocompress.models import tensor_state


def weights_bytes(module: nn.Module) -> bytes:
    """All parameters and buffers by name. What several names share is written once for each: the format knows no sharing, and loading
    into a module that shares them gives all the same values."""
    return save({key: value.detach().contiguous().clone() for key, value in tensor_state(module).items()})
