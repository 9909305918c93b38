"""State dicts: torch's keys, all or nothing, from wherever arrays come."""

import io

import numpy as np
import pytest
import support
from support import parameters, refused, same_bits, some

import fastbn

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


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
        (lambda state: list(state.items()), "got list; dict(state)", dict),
        (lambda state: state.items(), "got dict_items; dict(state)", dict),
        (npz, "got bytes; np.load(io.BytesIO(state))", lambda state: np.load(io.BytesIO(state))),
        (lambda state: io.BytesIO(npz(state)), "got BytesIO; np.load(state)", np.load),
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


@pytest.mark.parametrize("make", [fastbn.BatchNorm2d, lambda _: fastbn.LazyBatchNorm2d()])
@pytest.mark.parametrize(
    ("value", "counter"),
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
    ],
    ids=str,
)
def test_a_counter_is_a_real_number_of_any_dtype(trained, make, value, counter):
    bn = make(3)
    bn.load_state_dict(trained.state_dict() | {"num_batches_tracked": value})
    assert same_bits(bn.num_batches_tracked, np.array(counter, np.int64))


def test_a_bfloat16_counter(trained):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    trained.load_state_dict(
        trained.state_dict() | {"num_batches_tracked": np.array(9).astype(bfloat16)}
    )
    assert trained.num_batches_tracked == 9


@pytest.mark.parametrize("value", [-1, -1.0, np.nan, np.inf, -np.inf, 1e30, 2**63])
def test_a_counter_that_counts_nothing_is_refused(trained, value):
    state = fastbn.BatchNorm2d(3).state_dict() | {"num_batches_tracked": value}
    with refused(ValueError, "num_batches_tracked", intact=[trained]):
        trained.load_state_dict(state)


@pytest.mark.parametrize("value", ["3", 3j, None], ids=str)
def test_a_counter_that_is_no_real_number_is_refused(trained, value):
    state = fastbn.BatchNorm2d(3).state_dict() | {"num_batches_tracked": value}
    with refused(TypeError, "num_batches_tracked", intact=[trained]):
        trained.load_state_dict(state)


def test_the_result_has_names(trained):
    keys = trained.load_state_dict({"weight": np.ones(3), "more": np.ones(3)}, strict=False)
    assert keys.missing_keys == ["bias", "running_mean", "running_var"]
    assert keys.unexpected_keys == ["more"]
    assert keys == (keys.missing_keys, keys.unexpected_keys)


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
    "mean": "running_mean",
    "var": "running_var",
}


@pytest.mark.parametrize("library", FOREIGN)
def test_names_of_other_libraries_are_told_what_they_are_here(trained, library):
    state = {key: np.ones(3) for key in FOREIGN[library]}
    if library == "flax, without its paths":
        state["bias"] = np.ones(3)
    renamed = [f"{key!r} to {name!r}" for key, name in FOREIGN[library].items()]
    with pytest.raises(RuntimeError) as caught:
        trained.load_state_dict(state)
    assert all(words in str(caught.value) for words in renamed)
    assert "strict=False" not in str(caught.value)


def test_where_no_name_fits_the_error_says_which_names_would(trained):
    with pytest.raises(RuntimeError, match="the names that it knows are") as e:
        trained.load_state_dict({"bn.kernel": np.ones(3)}, prefix="bn.")
    assert "bn.weight, bn.bias, bn.running_mean" in str(e.value)
    assert "strict=False" not in str(e.value)
