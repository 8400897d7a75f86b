"""Files of others are checked before any runtime sees them."""

import os

import numpy as np
import pytest
from devices.files import linear_model
from onnx import TensorProto, external_data_helper, numpy_helper

from autocompress.errors import UsageError
from autocompress.export import check_onnx


def with_external_data(folder, location):
    """A model whose weight lies in another file."""
    model = linear_model()
    weight = model.graph.initializer[0]
    external_data_helper.set_external_data(weight, location=location, offset=0, length=len(numpy_helper.to_array(weight).tobytes()))
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("way", ["parent", "absolute", "symlink", "hardlink"])
def test_external_data_that_leaves_the_folder_is_refused(tmp_path, way):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.zeros(256, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    if way in ("symlink", "hardlink"):
        (os.symlink if way == "symlink" else os.link)(secret, folder / "weights.bin")
    location = {"parent": "../secret.bin", "absolute": str(secret)}.get(way, "weights.bin")
    with pytest.raises(UsageError, match="not a valid ONNX model"):
        check_onnx(with_external_data(folder, location))


def test_external_data_beside_the_file_is_read(tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.eye(16, dtype=np.float32).tobytes())
    model = check_onnx(with_external_data(tmp_path, "weights.bin"))
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), np.eye(16))


@pytest.mark.parametrize("length", [0, 1, 20, -200, -1])
def test_truncated_files_are_refused(tmp_path, length):
    payload = linear_model().SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(payload[:length])
    with pytest.raises(UsageError, match=r"cut\.onnx"):
        check_onnx(tmp_path / "cut.onnx")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UsageError):
            check_onnx(path)


def test_a_good_file_passes(tiny):
    assert check_onnx(tiny).graph.name == "tiny"
