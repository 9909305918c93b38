"""Arrays of others go in and out without a copy, and checkpoints of others load."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import support
from internals import checks
from support import refused, same_bits, some

import fastbn
from fastbn import functional as F

SHAPE = (4, 3, 6, 5)


class OnlyDLPack:
    """An object that exchanges its data through DLPack alone."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.device


def address(array):
    return array.__array_interface__["data"][0]


# Arrays.


@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last, support.sliced])
def test_a_dlpack_object_is_read_where_it_lies(rng, layout):
    x = layout(some(rng, SHAPE))
    bn = fastbn.BatchNorm2d(3)
    y = bn(OnlyDLPack(x))
    assert type(y) is np.ndarray
    assert same_bits(y, fastbn.BatchNorm2d(3)(x))
    # The backward reads what the forward has kept by reference, and notices a change.
    x *= 2
    dy = some(rng, SHAPE)
    with pytest.raises(RuntimeError, match="written to"):
        bn.backward(OnlyDLPack(dy))
    x /= 2
    statistics = F.batch_norm_forward(x)[1:]
    expected = F.batch_norm_backward(dy, x, bn.weight, *statistics)[0]
    assert same_bits(bn.backward(OnlyDLPack(dy)), expected)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_torch_tensor_goes_in_and_out_without_a_copy(rng, dtype, channels_last):
    torch = pytest.importorskip("torch")
    order = torch.channels_last if channels_last else torch.contiguous_format
    tensor = torch.from_numpy(some(rng, SHAPE, dtype)).to(memory_format=order)
    assert address(checks.as_array(tensor, "x")) == tensor.data_ptr()
    y = fastbn.BatchNorm2d(3)(tensor)
    back = torch.from_numpy(y)
    assert back.data_ptr() == address(y)
    assert back.is_contiguous(memory_format=order)
    assert same_bits(y, fastbn.BatchNorm2d(3)(tensor.numpy()))


@pytest.mark.torch
def test_bits_of_bfloat16_tensors_serve(rng):
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    tensor = torch.from_numpy(some(rng, SHAPE)).bfloat16()
    x = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert address(x) == tensor.data_ptr()
    y = torch.from_numpy(fastbn.BatchNorm2d(3)(x).view(np.int16)).view(torch.bfloat16)
    expected = torch.nn.BatchNorm2d(3)(tensor.float()).detach()
    support.assert_close(y.float().numpy(), expected.numpy(), 2**-8)


@pytest.mark.torch
@pytest.mark.parametrize("permuted", [False, True])
def test_a_bfloat16_tensor_goes_in_without_a_copy(rng, permuted):
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    tensor = torch.from_numpy(some(rng, SHAPE)).bfloat16()
    if permuted:
        tensor = tensor.permute(3, 1, 0, 2)
    x = checks.as_array(tensor, "x")
    assert address(x) == tensor.data_ptr()
    assert x.dtype == ml_dtypes.bfloat16
    bn, bits = fastbn.BatchNorm2d(3), tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    y, expected = bn(tensor), fastbn.BatchNorm2d(3)(bits)
    assert same_bits(y, expected)
    assert same_bits(bn.backward(tensor), bn_backward(bits))
    mean = tensor[0, :, 0, 0].contiguous()
    assert bn.load_state_dict({"running_mean": mean}, strict=False).unexpected_keys == []
    assert same_bits(bn.running_mean, mean.float().numpy())
    F.batch_norm(tensor, bn.running_mean, bn.running_var, mean, mean)


def bn_backward(x):
    """The gradient of x, with x as the gradient of the output."""
    bn = fastbn.BatchNorm2d(3)
    bn(x)
    return bn.backward(x)


@pytest.mark.torch
def test_tensors_that_cannot_be_read_are_refused_with_the_mend(rng, monkeypatch):
    torch = pytest.importorskip("torch")
    bn, half = fastbn.BatchNorm2d(3), torch.zeros(SHAPE, dtype=torch.bfloat16)
    meta = torch.zeros(SHAPE, device="meta")
    with support.refused(TypeError, "x is on torch's meta device", "to_empty", intact=[bn]):
        bn(meta)
    with support.refused(TypeError, "weight is on torch's meta device", intact=[bn]):
        bn.load_state_dict({"weight": meta[0, :, 0, 0]}, strict=False)
    with support.refused(TypeError, "x of type Tensor", "detach()", intact=[bn]):
        bn(half.clone().requires_grad_())
    with support.refused(TypeError, "out.view(torch.int16).numpy()", intact=[bn]):
        bn(torch.zeros(SHAPE), out=half)
    x = some(rng, SHAPE)
    with support.refused(TypeError, "mask is on torch's meta device", intact=[bn]):
        bn(x, mask=meta[:, :1] > 0)
    with support.refused(TypeError, "residual is on torch's meta device", intact=[bn]):
        bn(x, residual=meta)
    with support.refused(TypeError, "out must be", "no memory", intact=[bn]):
        bn(x, out=meta)
    with support.refused(TypeError, "np.from_dlpack(out.detach()) shares", intact=[bn]):
        bn(x, out=torch.zeros(SHAPE, requires_grad=True))
    with support.refused(TypeError, "strided", intact=[bn]):
        bn(half.to_sparse())
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with support.refused(TypeError, "pip install ml_dtypes", intact=[bn]):
        bn(half)


def test_memory_of_a_gpu_is_not_said_to_be_numpys():
    out = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 0))
    with support.refused(TypeError, "cupy.from_dlpack(out) shares its memory"):
        fastbn.BatchNorm2d(3)(np.zeros(SHAPE, np.float32), out=out)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_a_tensor_whose_memory_holds_the_negatives_is_read_right(rng, name):
    torch = pytest.importorskip("torch")
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    tensor = torch.from_numpy(some(rng, SHAPE)).to(getattr(torch, name))
    negative, x = tensor._neg_view(), -tensor
    vector, expected = negative[0, :, 0, 0], x[0, :, 0, 0]
    first, second = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    assert same_bits(first(negative, residual=negative), second(x, residual=x))
    assert same_bits(first.backward(negative)[0], second.backward(x)[0])
    first.load_state_dict({"weight": vector}, strict=False)
    second.load_state_dict({"weight": expected}, strict=False)
    folded = [fastbn.fold(first, a.transpose(0, 1))[0] for a in (negative, x)]
    assert same_bits(*folded)
    assert same_bits(first.running_mean, second.running_mean)
    with support.refused(TypeError, "holds the negatives", intact=[first]):
        first(np.zeros(SHAPE, np.float32), out=negative)


@pytest.mark.torch
def test_a_conjugate_has_such_an_imaginary_part(rng):
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(some(rng, SHAPE))
    imaginary = torch.complex(values, values).conj().imag
    assert imaginary.is_neg()
    assert same_bits(fastbn.Moments.of(imaginary).mean, fastbn.Moments.of(-values).mean)


def test_a_memory_map_is_normalized_in_place(rng, tmp_path):
    x = some(rng, SHAPE)
    mapped = np.memmap(tmp_path / "x", x.dtype, "w+", shape=SHAPE)
    mapped[...] = x
    assert fastbn.BatchNorm2d(3)(mapped, out=mapped) is mapped
    mapped.flush()
    stored = np.fromfile(tmp_path / "x", x.dtype).reshape(SHAPE)
    assert same_bits(stored, fastbn.BatchNorm2d(3)(x))


class Subclass(np.ndarray):
    pass


def test_a_subclass_is_read_where_it_lies_and_may_be_written_to(rng):
    x = some(rng, SHAPE).view(Subclass)
    assert address(checks.as_array(x, "x")) == address(x)
    expected = fastbn.BatchNorm2d(3)(x)
    assert type(expected) is np.ndarray
    assert fastbn.BatchNorm2d(3)(x, out=x) is x
    assert same_bits(x, expected)


# What does not go in, and what to do.


MASKED = np.ma.masked_less(np.linspace(-1, 1, 3), 0)
MASKED_X = np.ma.masked_less(np.linspace(-1, 1, 360).reshape(SHAPE), 0)
ONES = np.ones(3)
TAKES_MASKED = {
    "x": lambda bn: bn(MASKED_X),
    "out": lambda bn: bn(MASKED_X.data, out=MASKED_X),
    "dy": lambda bn: F.batch_norm_backward(MASKED_X, MASKED_X.data, None, ONES, ONES),
    "weight": lambda bn: F.batch_norm_forward(MASKED_X.data, MASKED),
    "running": lambda bn: F.batch_norm(MASKED_X.data, MASKED, ONES, training=True),
    "state": lambda bn: bn.load_state_dict(bn.state_dict() | {"running_mean": MASKED}),
    "moments": lambda bn: fastbn.Moments(2, MASKED, ONES),
    "moments of": lambda bn: fastbn.Moments.of(MASKED_X),
    "fold": lambda bn: fastbn.fold(bn, np.ones((3, 3)), MASKED),
}


@pytest.mark.parametrize("call", TAKES_MASKED.values(), ids=TAKES_MASKED)
def test_masked_arrays_are_refused_everywhere(call):
    bn = fastbn.BatchNorm2d(3)
    with refused(TypeError, "ask", intact=[bn, MASKED.data, MASKED_X.data]):
        call(bn)


@pytest.mark.parametrize("device", [(2, 0), (13, 1)])
def test_memory_of_a_gpu_is_refused_with_what_to_pass(rng, device):
    class OnGPU(OnlyDLPack):
        def __dlpack__(self, **_):
            raise BufferError("not for NumPy")

    with refused(TypeError, "OnGPU", "cupy.from_dlpack(x)"):
        fastbn.BatchNorm2d(3)(OnGPU(some(rng, SHAPE), device))


def test_what_is_written_to_must_be_an_array_and_the_error_says_how(rng):
    x, statistics = some(rng, SHAPE), np.zeros(3)
    bn = fastbn.BatchNorm2d(3)
    with refused(TypeError, "OnlyDLPack", "np.from_dlpack(out)", intact=[bn, x]):
        bn(x, out=OnlyDLPack(x))
    with refused(TypeError, "np.from_dlpack(running_mean)", intact=[x, statistics]):
        F.batch_norm(x, OnlyDLPack(statistics), statistics, training=True)


@pytest.mark.torch
def test_a_tensor_with_a_gradient_is_refused_with_what_to_pass():
    torch = pytest.importorskip("torch")
    with refused(TypeError, "x of type Tensor", "detach()"):
        fastbn.BatchNorm2d(3)(torch.ones(SHAPE, requires_grad=True))


# Checkpoints.


def npz(state, path):
    np.savez(path, **state)
    return np.load(f"{path}.npz")


def safetensors(state, path):
    module = pytest.importorskip("safetensors.numpy")
    module.save_file(state, path)
    return module.load_file(path)


def safetensors_mapped(state, path):
    safetensors(state, path)
    with pytest.importorskip("safetensors").safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


FORMATS = [npz, safetensors, safetensors_mapped]


@pytest.mark.parametrize("through", FORMATS)
def test_layers_of_one_checkpoint_are_told_apart_by_their_prefix(rng, tmp_path, through):
    layers = {"bn1.": fastbn.BatchNorm2d(3), "bn10.": fastbn.BatchNorm2d(5)}
    state = {}
    for prefix, layer in layers.items():
        layer(some(rng, (2, layer.num_features, 4, 4)))
        state |= layer.state_dict(prefix)
    checkpoint = through(state, tmp_path / "model")
    for prefix, layer in layers.items():
        restored = fastbn.LazyBatchNorm2d()
        restored.load_state_dict(checkpoint, prefix=prefix)
        for name, array in layer.state_dict().items():
            assert same_bits(getattr(restored, name), array)


@pytest.mark.torch
@pytest.mark.parametrize("through", FORMATS)
def test_a_model_of_torch_loads_through_its_checkpoint_and_directly(rng, tmp_path, through):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model(torch.from_numpy(some(rng, SHAPE)))
    theirs = model.state_dict()
    arrays = {key: tensor.numpy() for key, tensor in theirs.items()}
    for state in (theirs, through(arrays, tmp_path / "model")):
        bn = fastbn.BatchNorm2d(4)
        bn.load_state_dict(state, prefix="1.")
        for name, array in bn.state_dict("1.").items():
            assert same_bits(array, arrays[name])


def test_bfloat16_keeps_its_bits_in_safetensors(rng, tmp_path):
    dtype = support.dtype_of("bfloat16")
    bn = fastbn.BatchNorm2d(3, dtype=dtype)
    bn(some(rng, SHAPE))
    restored = fastbn.BatchNorm2d(3, dtype=dtype)
    restored.load_state_dict(safetensors(bn.state_dict(), tmp_path / "bn"))
    assert same_bits(restored.running_var, bn.running_var)


@pytest.mark.torch
def test_a_bfloat16_model_of_torch_loads_from_safetensors_and_directly(tmp_path):
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    dtype = support.dtype_of("bfloat16")
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.bfloat16)
    torch.nn.init.normal_(theirs.weight)
    save.save_file(theirs.state_dict(), tmp_path / "bn")
    from_file = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "bn")
    for state in (theirs.state_dict(), from_file):
        bn = fastbn.BatchNorm2d(3, dtype=dtype)
        bn.load_state_dict(state)
        assert (bn.weight.astype(np.float32) == theirs.weight.detach().float().numpy()).all()
