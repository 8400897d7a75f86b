"""Small ONNX files to measure."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def linear_model(n=16, inputs=None):
    """n x n matrix product as an ONNX model."""
    weight = numpy_helper.from_array(np.eye(n, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs or [1, n])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [(inputs or [1])[0], n])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def difference_model():
    """2 x 3 floating point numbers, less 2 x 1 whole ones."""
    nodes = [helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT), helper.make_node("Sub", ["a", "c"], ["y"])]
    inputs = [helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 3]), helper.make_tensor_value_info("b", TensorProto.INT64, [2, 1])]
    graph = helper.make_graph(nodes, "difference", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
