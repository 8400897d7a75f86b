"""Write a student as a file, check that the file computes the same, and keep what belongs to it together."""

from autocompress.export.bundle import (
    BUNDLE,
    MANIFEST,
    MODEL,
    POLICY,
    STUDENT,
    Manifest,
    Provenance,
    is_intact,
    library_versions,
    load_student,
    now,
    read_manifest,
    read_policy,
    update_manifest,
    verify_bundle,
    write_bundle,
)
from autocompress.export.onnx import check_onnx, onnx_bytes
from autocompress.export.parity import check_parity, compare, require_parity
from autocompress.export.weights import weights_bytes

__all__ = [
    "BUNDLE",
    "MANIFEST",
    "MODEL",
    "POLICY",
    "STUDENT",
    "Manifest",
    "Provenance",
    "check_onnx",
    "check_parity",
    "compare",
    "is_intact",
    "library_versions",
    "load_student",
    "now",
    "onnx_bytes",
    "read_manifest",
    "read_policy",
    "require_parity",
    "update_manifest",
    "verify_bundle",
    "weights_bytes",
    "write_bundle",
]
