"""The user's model: where it comes from, its weights, how it is called, and with what."""

from __future__ import annotations

from autocompress.models.calls import in_float32, simplify_call
from autocompress.models.examples import example_for
from autocompress.models.loading import load_model
from autocompress.models.weights import load_tensor_state, load_weights, read_state, tensor_state

__all__ = [
    "example_for", "in_float32", "load_model", "load_tensor_state", "load_weights", "read_state", "simplify_call", "tensor_state",
]  # fmt: skip
