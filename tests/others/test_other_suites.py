"""The cases by which others test batch normalization, taken from their packages where installed."""

import numpy as np
import pytest
import support
from support import same_bits

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.torch

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


# torch's generators of module inputs, and of sample inputs of functions.


def module_cases(dtype, training):
    """(name, arguments, keyword arguments, input) of every case for the three layers."""
    torch = pytest.importorskip("torch")
    # Not a public module: it moves, and needs packages that torch does not install.
    modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    for info in modules.module_db:
        if info.module_cls.__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
            for case in info.module_inputs_func(
                info,
                device="cpu",
                dtype=getattr(torch, dtype),
                requires_grad=False,
                training=training,
            ):
                made = case.constructor_input
                yield info.module_cls.__name__, made.args, made.kwargs, case.forward_input.args[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_module_inputs(dtype, training):
    torch = pytest.importorskip("torch")
    cases = list(module_cases(dtype, training))
    for name, args, kwargs, x in cases:
        theirs = getattr(torch.nn, name)(*args, dtype=x.dtype, **kwargs).train(training)
        ours = getattr(fastbn, name)(*args, dtype=dtype, **kwargs).train(training)
        ours.load_state_dict(theirs.state_dict())
        for _ in range(2):
            x = x.detach().requires_grad_()
            y = theirs(x)
            support.assert_close(ours(x.detach().numpy()), y.detach().numpy(), TOLERANCE[dtype])
            if training:
                y.backward(y.detach() + 1)
                dx = ours.backward(y.detach().numpy() + 1)
                # dx is next to nothing, what it is the difference of is not.
                support.assert_within(dx, x.grad.numpy(), 10 * TOLERANCE[dtype])
        state = theirs.state_dict()
        if x.numel() == 0:  # torch counts an empty batch
            state.pop("num_batches_tracked")
        for key, value in state.items():
            support.assert_close(getattr(ours, key), value.numpy(), TOLERANCE[dtype])
    assert len(cases) > 15


def function_cases(dtype):
    """(input, arguments, keyword arguments) of every case, as arrays."""
    torch = pytest.importorskip("torch")
    database = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", exc_type=ImportError
    )
    info = next(
        op
        for op in database.op_db
        if op.name == "nn.functional.batch_norm" and not op.variant_test_name
    )
    for case in info.sample_inputs("cpu", getattr(torch, dtype), requires_grad=False):
        yield case.input, case.args, case.kwargs


def array(value):
    return value.numpy().copy() if hasattr(value, "numpy") else value


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torchs_sample_inputs(dtype):
    torch = pytest.importorskip("torch")
    cases = list(function_cases(dtype))
    for x, args, kwargs in cases:
        arrays = [array(a) for a in args]
        options = {key: array(value) for key, value in kwargs.items()}
        tensors = [a.clone() if hasattr(a, "clone") else a for a in args]
        if x.ndim < 2:  # torch takes an empty vector for a batch
            with pytest.raises(ValueError, match=r"\(N, C, ...\)"):
                F.batch_norm(x.numpy(), *arrays, **options)
            continue
        y = torch.nn.functional.batch_norm(x, *tensors, **kwargs)
        ours = F.batch_norm(x.numpy(), *arrays, **options)
        nan = torch.isnan(y).numpy()  # of a negative running variance
        assert same_bits(np.isnan(ours), nan)
        support.assert_close(ours[~nan], y.numpy()[~nan], TOLERANCE[dtype])
        for mine, other in zip(arrays[:2], tensors[:2], strict=True):
            if mine is not None:
                support.assert_close(mine, other.numpy(), TOLERANCE[dtype])
    assert len(cases) > 8


# ONNX's node tests. Its momentum is the share of the old value, and its running variance moves
# towards that of the population.


@pytest.fixture
def onnx_cases(monkeypatch):
    """(node, inputs, outputs) of every node test."""
    onnx = pytest.importorskip("onnx.backend.test.case.node.batch_normalization")
    cases = []

    def collect(node, inputs, outputs, name):
        cases.append((node, inputs, outputs))

    monkeypatch.setattr(onnx, "expect", collect)
    onnx.BatchNormalization.export()
    onnx.BatchNormalization.export_train()
    return cases


def test_the_node_tests_of_onnx(onnx_cases):
    for node, inputs, (expected, *moved) in onnx_cases:
        x, weight, bias, mean, var = (a.copy() for a in inputs)
        options = {
            a.name: a.f if a.name in ("epsilon", "momentum") else a.i for a in node.attribute
        }
        eps, training = options.get("epsilon", 1e-5), bool(options.get("training_mode", 0))
        momentum = 1 - options.get("momentum", 0.9)
        y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps, unbiased=False)
        support.assert_close(y, expected, 1e-5)
        for ours, theirs in zip((mean, var), moved, strict=False):  # None moves in evaluation.
            support.assert_close(ours, theirs, 1e-5)
    assert {len(outputs) for _, _, outputs in onnx_cases} == {1, 3}
