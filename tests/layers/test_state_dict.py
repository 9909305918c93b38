"""State dicts: torch's keys, all or nothing, from wherever arrays come."""

import copy
import io
import re
import zipfile

import numpy as np
import pytest
import support
from cases import each
from internals import alone_on_its_rank
from kinds import KINDS, TRACKING, OneRank
from support import parameters, refused, same_bits, some

import fastbn

every = pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)
tracking = pytest.mark.parametrize(
    "make", [make for make, _ in TRACKING.values()], ids=list(TRACKING)
)
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def names_of(layer):
    """The names of all arrays in the state of a layer."""
    return KEYS[:2] if isinstance(layer, fastbn.GroupNorm) else KEYS


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())


@pytest.fixture
def trained(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.backward(some(rng, (4, 3, 5, 2)))
    return bn


def assert_loaded(bn, state):
    for key, value in state.items():
        assert same_bits(getattr(bn, key), value)


@pytest.mark.parametrize(
    ("kwargs", "keys"),
    [
        ({}, KEYS),
        ({"bias": False}, [KEYS[0], *KEYS[2:]]),
        ({"affine": False}, KEYS[2:]),
        ({"track_running_stats": False}, KEYS[:2]),
        ({"affine": False, "track_running_stats": False}, []),
    ],
    ids=str,
)
def test_the_keys_are_those_of_torch(kwargs, keys):
    assert list(fastbn.BatchNorm2d(3, **kwargs).state_dict()) == keys


def test_a_state_survives_the_round_trip(trained):
    bn = fastbn.BatchNorm2d(3)
    missing, unexpected = bn.load_state_dict(trained.state_dict())
    assert list(missing) == list(unexpected) == []
    assert_loaded(bn, trained.state_dict())


def test_a_state_dict_holds_copies(trained):
    state = trained.state_dict()
    with support.untouched(trained):
        for array in state.values():
            array[...] = 9


def test_loading_copies_into_the_arrays_that_are_there(trained):
    bn = fastbn.BatchNorm2d(3)
    there = {key: getattr(bn, key) for key in KEYS}
    state = trained.state_dict()
    bn.load_state_dict(state)
    for key in KEYS:
        assert getattr(bn, key) is there[key]
        assert not np.shares_memory(there[key], state[key])


def test_loading_converts_to_the_dtype_that_is_there(trained, dtype):
    bn = fastbn.BatchNorm2d(3, dtype=dtype)
    bn.load_state_dict(trained.state_dict())
    assert same_bits(bn.weight, trained.weight.astype(dtype))
    assert same_bits(bn.running_var, trained.running_var.astype(dtype))


def test_a_prefix_is_put_before_every_key(trained):
    state = trained.state_dict(prefix="block.1.")
    assert list(state) == ["block.1." + key for key in KEYS]
    bn = fastbn.BatchNorm2d(3)
    bn.load_state_dict(state, prefix="block.1.")
    assert_loaded(bn, trained.state_dict())


def test_with_a_prefix_other_keys_are_none_of_its_business(trained):
    state = {"head.weight": np.zeros((7, 7)), **trained.state_dict(prefix="bn.")}
    missing, unexpected = fastbn.BatchNorm2d(3).load_state_dict(state, prefix="bn.")
    assert list(missing) == list(unexpected) == []


def test_missing_and_unexpected_keys_are_returned_by_their_full_names(trained):
    state = trained.state_dict(prefix="bn.")
    del state["bn.bias"]
    state["bn.extra"] = np.zeros(3)
    bn = fastbn.BatchNorm2d(3)
    missing, unexpected = bn.load_state_dict(state, strict=False, prefix="bn.")
    assert list(missing) == ["bn.bias"]
    assert list(unexpected) == ["bn.extra"]
    assert same_bits(bn.weight, trained.weight)
    assert (bn.bias == 0).all()


@pytest.mark.parametrize("key", KEYS[:4])
def test_a_missing_entry_is_refused(trained, key):
    state = fastbn.BatchNorm2d(3).state_dict(prefix="bn.")
    del state["bn." + key]
    with refused(RuntimeError, "bn." + key, intact=[trained]):
        trained.load_state_dict(state, prefix="bn.")


def test_an_unexpected_entry_is_refused(trained):
    state = fastbn.BatchNorm2d(3).state_dict() | {"extra": np.zeros(3)}
    with refused(RuntimeError, "extra", intact=[trained]):
        trained.load_state_dict(state)


def test_entries_for_arrays_that_the_layer_lacks_are_unexpected():
    state = fastbn.BatchNorm2d(3).state_dict()
    bn = fastbn.BatchNorm2d(3, affine=False)
    with refused(RuntimeError, "weight", "bias", intact=[bn]):
        bn.load_state_dict(state)
    _, unexpected = bn.load_state_dict(state, strict=False)
    assert list(unexpected) == ["weight", "bias"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", KEYS[:4])
def test_a_misshapen_entry_is_refused(trained, key, strict):
    state = fastbn.BatchNorm2d(3).state_dict() | {key: np.zeros(4, np.float32)}
    with refused(RuntimeError, key, (3,), (4,), intact=[trained]):
        trained.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_misshapen_counter_is_refused(trained, strict):
    state = fastbn.BatchNorm2d(3).state_dict() | {"num_batches_tracked": np.zeros(2, np.int64)}
    with refused(RuntimeError, "num_batches_tracked", intact=[trained]):
        trained.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("value", [np.ones(3, complex), np.array(["a", "b", "c"]), [object()] * 3])
def test_an_entry_that_is_not_real_is_refused(trained, value):
    state = fastbn.BatchNorm2d(3).state_dict() | {"running_var": value}
    with refused(TypeError, "running_var", intact=[trained]):
        trained.load_state_dict(state)


@pytest.mark.parametrize("make", [lambda: fastbn.BatchNorm2d(3), fastbn.LazyBatchNorm2d])
def test_arguments_have_the_names_that_they_have_in_torch(trained, make):
    bn = make()
    bn.load_state_dict(state_dict=trained.state_dict(prefix="a."), strict=True, prefix="a.")
    assert_loaded(bn, trained.state_dict())


@pytest.mark.parametrize("state", [None, 3, [("weight", np.ones(3))]])
def test_a_state_that_is_no_mapping_is_refused(trained, state):
    with refused(TypeError, intact=[trained]):
        trained.load_state_dict(state)


def npz(state):
    """The bytes of a file with a state."""
    file = io.BytesIO()
    np.savez(file, **state)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "words", "mend"),
    [
        (lambda state: list(state.items()), "got list; dict(state_dict)", dict),
        (lambda state: state.items(), "got dict_items; dict(state_dict)", dict),
        (
            npz,
            "got bytes; np.load(io.BytesIO(state_dict))",
            lambda state: np.load(io.BytesIO(state)),
        ),
        (lambda state: io.BytesIO(npz(state)), "got BytesIO; np.load(state_dict)", np.load),
    ],
    ids=["list of pairs", "items", "bytes", "open file"],
)
def test_a_state_in_another_form_is_refused_with_the_mend(trained, form, words, mend):
    bn, expected = fastbn.BatchNorm2d(3), trained.state_dict()
    state = form(expected)
    with refused(TypeError, words, intact=[bn]):
        bn.load_state_dict(state)
    bn.load_state_dict(mend(state))
    assert_loaded(bn, expected)


def saved_by_torch(folder):
    """A file as torch.save writes it, as far as NumPy reads it: a zip of no arrays."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "byteorder", "data/0", "version"):
            file.writestr(f"model/{name}", b"")
    return path


OF_TORCH = {
    "path": lambda path: path,
    "name": lambda path: str(path.with_suffix(".pth")),
    "open file": lambda path: path.open("rb"),
    "bytes": lambda path: path.read_bytes(),
    "np.load": np.load,
    "dict": lambda path: dict(np.load(path)),
}


@pytest.mark.parametrize("form", OF_TORCH.values(), ids=OF_TORCH)
@pytest.mark.parametrize("make", [lambda: fastbn.BatchNorm2d(3), fastbn.LazyBatchNorm2d])
@pytest.mark.parametrize("prefix", ["", "bn."])
def test_what_reads_a_file_of_torch_is_told(tmp_path, form, make, prefix):
    state = form(saved_by_torch(tmp_path))
    with refused((TypeError, RuntimeError), "torch.load(path)", "v.numpy()", "np.savez"):
        make().load_state_dict(state, prefix=prefix)
    if hasattr(state, "close"):
        state.close()


def test_a_state_without_a_counter_is_accepted(trained):
    state = fastbn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    missing, unexpected = trained.load_state_dict(state)
    assert list(missing) == list(unexpected) == []
    assert_loaded(trained, state)
    assert trained.num_batches_tracked == 1


def test_a_counter_may_be_a_python_int(trained):
    trained.load_state_dict(trained.state_dict() | {"num_batches_tracked": 12})
    assert same_bits(trained.num_batches_tracked, np.array(12, np.int64))


def test_loading_leaves_the_gradients_alone(trained):
    kept = trained.weight_grad.copy()
    trained.load_state_dict(fastbn.BatchNorm2d(3).state_dict())
    assert same_bits(trained.weight_grad, kept)


def test_a_state_survives_npz(trained, tmp_path):
    np.savez(tmp_path / "bn.npz", **trained.state_dict())
    bn = fastbn.BatchNorm2d(3)
    with np.load(tmp_path / "bn.npz") as state:
        bn.load_state_dict(state)
    assert_loaded(bn, trained.state_dict())


def test_a_state_survives_safetensors(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(trained.state_dict(), tmp_path / "bn.safetensors")
    bn = fastbn.BatchNorm2d(3)
    bn.load_state_dict(safetensors.load_file(tmp_path / "bn.safetensors"))
    assert_loaded(bn, trained.state_dict())


def test_read_only_and_memory_mapped_arrays_load(trained, tmp_path):
    state = trained.state_dict()
    for key in KEYS:
        np.save(tmp_path / f"{key}.npy", state[key])
    bn = fastbn.BatchNorm2d(3)
    bn.load_state_dict({key: np.load(tmp_path / f"{key}.npy", mmap_mode="r") for key in KEYS})
    assert_loaded(bn, state)
    bn(np.ones((2, 3, 4, 4), np.float32))


def test_a_read_only_array_is_found_before_anything_is_loaded(trained):
    state = fastbn.BatchNorm2d(3).state_dict()
    trained.running_var = support.read_only(trained.running_var)
    with refused(ValueError, "running_var", intact=[trained]):
        trained.load_state_dict(state)


def test_a_state_that_shares_memory_with_the_layer_is_loaded_right(trained):
    weight, bias = trained.weight.copy(), trained.bias.copy()
    state = trained.state_dict() | {"weight": trained.bias, "bias": trained.weight}
    trained.load_state_dict(state)
    assert same_bits(trained.weight, bias)
    assert same_bits(trained.bias, weight)


# What averages of states and casts make of a counter; what torch loads.


@tracking
@each(
    "value, counter",
    [
        (np.float64(3.9), 3),
        (np.array(7.0, np.float16), 7),
        (np.array([5]), 5),
        (np.array([5.5], np.float32), 5),
        (True, 1),
        (np.array(False), 0),
        (12, 12),
        (2**53, 2**53),
        (np.array(2**62 + 1), 2**62 + 1),
        (np.array(4.5, np.longdouble), 4),
        (np.array(6.0, ">f4"), 6),
        (np.array(6, ">u2"), 6),
    ],
)
def test_a_counter_is_a_real_number_of_any_dtype(trained, make, value, counter):
    layer = make()
    layer.load_state_dict(trained.state_dict() | {"num_batches_tracked": value})
    assert same_bits(layer.num_batches_tracked, np.array(counter, np.int64))


TAUGHT = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint4", "int2"]


@pytest.mark.parametrize("name", TAUGHT)
def test_numbers_of_dtypes_that_numpy_is_taught(trained, name):
    dtype = getattr(pytest.importorskip("ml_dtypes"), name, None)
    if dtype is None:
        pytest.skip(f"this ml_dtypes has no {name}")
    state = {key: np.ones_like(array).astype(dtype) for key, array in trained.state_dict().items()}
    trained.load_state_dict(state)
    assert_loaded(trained, {key: np.ones_like(array) for key, array in LIKE_STATE.items()})


LIKE_STATE = fastbn.BatchNorm2d(3).state_dict()


def test_entries_of_the_widest_dtype(trained):
    state = {key: value.astype(np.longdouble) for key, value in trained.state_dict().items()}
    loaded = fastbn.BatchNorm2d(3)
    loaded.load_state_dict(state)
    assert_loaded(loaded, trained.state_dict())


@pytest.mark.parametrize("dtype", ["V2", "V4", "c8", "U1", "S1", "O", "m8", "f4,f4", [("a", "f4")]])
@pytest.mark.parametrize("key", ["running_var", "num_batches_tracked"])
def test_what_does_not_hold_real_numbers_is_refused(trained, key, dtype):
    state = trained.state_dict()
    state[key] = np.zeros(state[key].shape, dtype)
    with refused(TypeError, key, "real number", intact=[trained]):
        trained.load_state_dict(state)


@pytest.mark.parametrize("value", [-1, -1.0, np.nan, np.inf, -np.inf, 1e30, 2**63, [-1.0], ["nan"]])
def test_a_counter_that_counts_nothing_is_refused(trained, value):
    if isinstance(value, list):
        value = np.array(value, np.longdouble)
    state = fastbn.BatchNorm2d(3).state_dict() | {"num_batches_tracked": value}
    with refused(ValueError, "num_batches_tracked", intact=[trained]):
        trained.load_state_dict(state)


@pytest.mark.parametrize("value", ["3", 3j, None], ids=str)
def test_a_counter_that_is_no_real_number_is_refused(trained, value):
    state = fastbn.BatchNorm2d(3).state_dict() | {"num_batches_tracked": value}
    with refused(TypeError, "num_batches_tracked", intact=[trained]):
        trained.load_state_dict(state)


@every
@each("prefix", ["", "bn."])
def test_the_result_has_names(make, shape, prefix):
    layer = make()
    names = [key for key in KEYS[1:4] if key in names_of(layer)]
    state = {prefix + "weight": np.ones(3), prefix + "more": np.ones(3)}
    keys = layer.load_state_dict(state, strict=False, prefix=prefix)
    assert keys.missing_keys == [prefix + name for name in names]
    assert keys.unexpected_keys == [prefix + "more"]
    assert keys == (keys.missing_keys, keys.unexpected_keys)
    assert same_bits(layer(input=np.ones(shape)), layer(np.ones(shape)))  # torch's name of x


# Names of other libraries.

FOREIGN = {
    "keras": {
        "batch_normalization/gamma:0": "weight",
        "batch_normalization/beta:0": "bias",
        "batch_normalization/moving_mean:0": "running_mean",
        "batch_normalization/moving_variance:0": "running_var",
    },
    "onnx": {
        "scale": "weight",
        "B": "bias",
        "input_mean": "running_mean",
        "input_var": "running_var",
    },
    "flax": {
        "params/bn/scale": "weight",
        "params/bn/bias": "bias",
        "batch_stats/bn/mean": "running_mean",
        "batch_stats/bn/var": "running_var",
    },
}


FOREIGN["flax, without its paths"] = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
FOREIGN |= {
    name: {prefix + key: name for key, name in FOREIGN[library].items()}
    for name, prefix, library in (
        ("onnx, underscores", "bn_", "onnx"),
        ("onnx, dots", "features.bn.", "onnx"),
        ("onnx, short", "bn_", "flax, without its paths"),
    )
}


@every
@each("library", list(FOREIGN))
def test_names_of_other_libraries_are_told_what_they_are_here(make, shape, library):
    layer, state = make(), {key: np.ones(3) for key in FOREIGN[library]}
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    message = str(caught.value)
    for key, name in FOREIGN[library].items():
        if key != name:
            renamed = f"{key!r} to {name!r}"
            assert (renamed in message) == (name in names_of(layer))
    if "running_mean" not in names_of(layer):
        assert "; leave out '" in message
    assert "strict=False" not in message


NESTED = {
    "flat": ({"params": {}, "batch_stats": {}}, "", "['params']", "['batch_stats']"),
    "named": (
        {"params": {"BatchNorm_0": {}, "Conv_0": {"bias": 1}}, "batch_stats": {"BatchNorm_0": {}}},
        "BatchNorm_0",
        "['params']['BatchNorm_0']",
        "['batch_stats']['BatchNorm_0']",
    ),
}


@each("state, name, params, stats", NESTED)
@every
def test_entries_of_nested_mappings_are_told(make, shape, state, name, params, stats):
    layer, state = make(), copy.deepcopy(state)
    of_params, of_stats = state["params"], state["batch_stats"]
    if name:
        of_params, of_stats = of_params[name], of_stats[name]
    of_params |= {"scale": np.full(3, 2.0), "bias": np.full(3, 3.0)}
    of_stats |= {"mean": np.full(3, 4.0), "var": np.full(3, 5.0)}
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state)
    message = str(caught.value)
    assert f"'weight': state_dict{params}['scale'], 'bias': state_dict{params}['bias']" in message
    is_tracking = "running_mean" in names_of(layer)
    words = f"'running_mean': state_dict{stats}['mean'], 'running_var': state_dict{stats}['var']"
    assert (words in message) == is_tracking
    advice = message[message.index("; pass ") + 7 : message.index("}") + 1]
    layer.load_state_dict(eval(advice, {"state_dict": state}))
    assert layer.bias.tolist() == [3, 3, 3]


def test_of_several_layers_in_a_file_one_is_told(trained):
    names = {"gamma": "weight", "beta": "bias"}
    names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    state = {f"bn{k}/{name}:0": np.ones(3) for k in range(3) for name in names}
    state |= {"conv/kernel:0": np.ones((3, 3, 2, 3)), "conv/bias:0": np.ones(3)}
    with pytest.raises(RuntimeError) as caught:
        trained.load_state_dict(state)
    hint = str(caught.value).partition("; ")[2]
    renamed = ", ".join(f"'bn0/{key}:0' to '{name}'" for key, name in names.items())
    assert hint == f"of its 3 layers, 'bn0/' and 'bn1/' ..., take one; rename {renamed}"
    with pytest.raises(RuntimeError) as caught:
        trained.load_state_dict(state, prefix="bn2/")
    assert "'bn2/gamma:0' to 'bn2/weight'" in str(caught.value)
    assert "bn0/" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"affine": False}, "; a layer with affine=True has 'gamma', 'beta'"),
        ({"bias": False}, "; a layer with bias=True has 'beta'"),
        ({"track_running_stats": False}, "; a layer with track_running_stats=True has 'moving_mea"),
    ],
)
def test_no_key_is_renamed_to_what_the_layer_lacks(options, words):
    layer = fastbn.BatchNorm2d(3, **options)
    state = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), np.ones(3))
    with pytest.raises(RuntimeError, match=re.escape(words)) as caught:
        layer.load_state_dict(state)
    told = set(re.findall(r" to '(\w+)'", str(caught.value)))
    assert told == set(layer.state_dict()) - {"num_batches_tracked"}


def test_no_key_is_renamed_to_one_that_is_there(trained):
    with pytest.raises(RuntimeError, match="strict=False loads those that fit"):
        trained.load_state_dict(trained.state_dict() | {"teacher_mean": np.ones(3)})


def test_the_prefixes_of_several_layers_are_told(trained):
    state = trained.state_dict("bn1.") | trained.state_dict("bn2.")
    state["conv.weight"] = np.ones((3, 3, 3, 3))
    with pytest.raises(RuntimeError, match=r"perhaps with prefix='bn1\.' or 'bn2\.'"):
        trained.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"perhaps with prefix='gn\.'$"):
        fastbn.GroupNorm(1, 3).load_state_dict(
            {
                f"{layer}.{name}": np.ones((3,) * n)
                for n, layer in enumerate(["_", "gn", "conv"])
                for name in ("weight", "bias")
            }
        )


def test_where_no_name_fits_the_error_says_which_names_would(trained):
    with pytest.raises(RuntimeError, match="the names that it knows are") as e:
        trained.load_state_dict({"bn.kernel": np.ones(3)}, prefix="bn.")
    assert "bn.weight, bn.bias, bn.running_mean" in str(e.value)
    assert "strict=False" not in str(e.value)


def test_a_counter_of_two_axes_is_refused():
    bn = fastbn.BatchNorm1d(2)
    with pytest.raises(RuntimeError, match=r"must have the shape \(\)"):
        bn.load_state_dict({**bn.state_dict(), "num_batches_tracked": np.ones((1, 1), int)})
