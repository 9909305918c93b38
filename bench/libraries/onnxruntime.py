"""ONNX Runtime: the BatchNormalization operator, in inference."""

from __future__ import annotations

from functools import partial

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench import library
from bench.arrays import new_array
from bench.cases import EPS, Case, Data
from bench.library import PreparedCall, require

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
}
OPSET = 15


class Library(library.Library):
    """A model of one node."""

    api = "InferenceSession.run_with_iobinding of a model of one node"
    buffers = "preallocated: bound by io_binding; InferenceSession.run where a new array is made"

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def variants(self, case: Case) -> list[str]:
        require(case.evaluation, "inference only")
        require(not case.in_place, "an output of its own is asked for")
        require(case.dtype in TYPES, f"no {case.dtype} here")
        return super().variants(case)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            model(case, data), options, providers=["CPUExecutionProvider"]
        )
        if case.fresh:
            run = partial(session.run, None, {"x": data.x})
            return PreparedCall(run, lambda results: {"y": results[0]}, False)
        out = new_array(case.shape, data.x.dtype)
        binding = session.io_binding()
        for bind, name, array in (
            (binding.bind_input, "x", data.x),
            (binding.bind_output, "y", out),
        ):
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return PreparedCall(
            partial(session.run_with_iobinding, binding), lambda _: {"y": out}, True
        )


def model(case: Case, data: Data) -> bytes:
    """The operator with its parameters as constants."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensor = partial(helper.make_tensor_value_info, elem_type=TYPES[case.dtype], shape=case.shape)
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)],
        "batch_norm",
        [tensor("x")],
        [tensor("y")],
        [numpy_helper.from_array(getattr(data, n).astype(data.dtype), n) for n in names],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
