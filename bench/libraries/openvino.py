"""OpenVINO: its batch norm operation, in inference."""

from __future__ import annotations

import openvino as ov
from openvino import opset15

from bench import library
from bench.arrays import new_array
from bench.cases import EPS, Case, Data
from bench.library import PreparedCall, require


class Library(library.Library):
    """A compiled model of one operation."""

    api = "InferRequest.infer of a model of one operation"
    buffers = "preallocated: tensors on given memory"

    def versions(self) -> dict[str, str]:
        return {"openvino": ov.get_version()}

    def variants(self, case: Case) -> list[str]:
        require(case.evaluation, "inference only")
        require(not case.in_place, "an output of its own is asked for")
        require(not case.fresh, "its results are in memory of the request")
        require(case.dtype in ("float32", "float16"), f"no {case.dtype} here")
        return super().variants(case)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        x = opset15.parameter(list(case.shape), data.dtype.type, name="x")
        vectors = [
            opset15.constant(v.astype(data.dtype))
            for v in (data.weight, data.bias, data.running_mean, data.running_var)
        ]
        model = ov.Model([opset15.batch_norm_inference(x, *vectors, EPS)], [x], "batch_norm")
        compiled = ov.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": self.threads,
                "PERFORMANCE_HINT": "LATENCY",
                # On some machines the default computes float32 models in 16 bits.
                "INFERENCE_PRECISION_HINT": "f32" if case.dtype == "float32" else "f16",
            },
        )
        out = new_array(case.shape, data.x.dtype)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(data.x, shared_memory=True))
        request.set_output_tensor(ov.Tensor(out, shared_memory=True))
        return PreparedCall(request.infer, lambda _: {"y": out}, True)
