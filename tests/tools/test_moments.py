"""Moments: a value that adds up, exactly to rounding, in any order and across processes."""

import concurrent.futures
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import reference
import support
from support import same_bits, some

from fastbn import Moments
from fastbn.functional import batch_norm_stats

EXAMPLE = Path(__file__).parents[2] / "examples" / "moments.py"
DATA = {
    "N(0, 1)": (0.0, 1.0),
    "N(1e3, 1)": (1e3, 1.0),
    "N(1e6, 1)": (1e6, 1.0),
    "N(1, 1e-4)": (1.0, 1e-4),
}


def assert_accurate(actual, x, ulps):
    """Asserts that mean and variance are the exact ones of x, to so many ulp of float64."""
    assert_near(actual, *reference.moments(x), ulps)


def assert_near(actual, count, mean, var, ulps):
    """Asserts mean and variance within so many ulp at the size of max(|mean|, std).

    In the variance such an ulp counts 1 + |mean| / std times: it is that of a mean.
    """
    assert actual.count == count
    size = np.maximum(np.abs(mean), np.sqrt(var))
    support.assert_within(actual.mean, mean, ulps * reference.ulp(size, np.float64))
    bound = reference.ulp(var, np.float64) + np.sqrt(var) * reference.ulp(size, np.float64)
    support.assert_within(actual.var(), var, ulps * bound)


def test_the_moments_of_an_array_are_those_of_the_primitive(rng, dtype):
    x = some(rng, (4, 3, 5, 2), dtype)
    count, mean, m2 = batch_norm_stats(x)
    moments = Moments.of(x)
    assert moments.count == count
    assert same_bits(moments.mean, mean)
    assert same_bits(moments.m2, m2)


@pytest.mark.parametrize(("mean", "std"), DATA.values(), ids=DATA)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 63), (32, 32), (7, 20, 5, 1, 31)], ids=str)
def test_a_sum_is_exact_to_rounding(rng, mean, std, sizes):
    x = some(rng, (sum(sizes), 3, 7), np.float64, mean, std)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    assert_accurate(sum(map(Moments.of, parts)), x, 2)


def test_small_integers_add_up_exactly():
    a, b = Moments.of([[1.0], [3.0]]), Moments.of([[6.0], [10.0]])
    assert a + b == Moments(4, [5.0], [46.0])


@pytest.mark.parametrize(("mean", "std"), DATA.values(), ids=DATA)
def test_addition_is_associative_and_commutative_to_rounding(rng, mean, std):
    for sizes in itertools.product((1, 2, 30, 1000), repeat=3):
        parts = [some(rng, (size, 2), np.float64, mean, std) for size in sizes]
        a, b, c = map(Moments.of, parts)
        one = (a + b) + c
        for other in (a + (b + c), (b + a) + c, (c + a) + b):
            assert_near(other, one.count, one.mean, one.var(), 2)


def test_ten_thousand_parts_one_after_the_other(rng):
    x = some(rng, (10_000, 2, 3), np.float64, 1e3, 1.0)
    assert_accurate(sum(Moments.of(row[np.newaxis]) for row in x), x, 50)


def test_a_tree_of_ten_thousand_parts_is_exact_to_two_ulp(rng):
    x = some(rng, (10_000, 2, 3), np.float64, 1e3, 1.0)
    level = [Moments.of(row[np.newaxis]) for row in x]
    while len(level) > 1:
        level = [sum(level[i : i + 2]) for i in range(0, len(level), 2)]
    assert_accurate(level[0], x, 2)


def test_constants_have_no_variance_however_they_are_split():
    parts = [np.full((n, 1), 0.1) for n in (1, 2, 3, 50, 7)]
    total = sum(map(Moments.of, parts))
    assert total == Moments(63, [0.1], [0.0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(rng, value):
    x = some(rng, (6, 3, 2), np.float64)
    x[4, 1, 0] = value
    total = Moments.of(x[:2]) + Moments.of(x[2:])
    expected = Moments.of(x[:2, ::2]) + Moments.of(x[2:, ::2])
    assert same_bits(total.mean[::2], expected.mean)
    assert same_bits(total.m2[::2], expected.m2)
    assert not np.isfinite(total.mean[1])


def test_counts_beyond_64_bits_add_up():
    half = Moments(2**70, [1.0], [2.0])
    assert half + half == Moments(2**71, [1.0], [4.0])


@pytest.mark.parametrize("empty", [Moments(), Moments.of(np.empty((0, 3))), 0], ids=str)
def test_nothing_adds_nothing(rng, empty):
    moments = Moments.of(some(rng, (4, 3)))
    assert empty + moments == moments
    assert empty + Moments() + moments == moments
    if empty != 0:
        assert moments + empty == moments


def test_nothing_adds_nothing_to_nothing_and_to_what_is_not_finite():
    nothing, infinite = Moments.of(np.empty((0, 1))), Moments(3, [np.inf], [np.inf])
    assert nothing + nothing == nothing
    assert nothing + infinite == infinite + nothing == infinite


def test_the_identity_takes_on_any_number_of_channels():
    assert Moments() + Moments.of(np.empty((0, 3))) == Moments.of(np.empty((0, 3)))
    assert Moments() + Moments() == Moments() == sum([], Moments())


def test_moments_of_different_channels_do_not_add_up(rng):
    with support.refused(ValueError, 3, 4):
        Moments.of(np.empty((0, 3))) + Moments.of(np.ones((2, 4)))


@pytest.mark.parametrize("other", [1, 0.0, None, "0", np.zeros(3)], ids=repr)
def test_only_moments_add_to_moments(other):
    with pytest.raises(TypeError):
        Moments() + other
    with pytest.raises(TypeError):
        other + Moments()


def test_variance_and_standard_deviation_take_numpys_correction(rng):
    x = some(rng, (10, 3), np.float64)
    moments = Moments.of(x)
    for correction in (0, 1, 1.5):
        expected = x.var(axis=0, ddof=correction)
        support.assert_close(moments.var(correction=correction), expected, 1e-15)
        support.assert_close(moments.std(correction), np.sqrt(expected), 1e-15)


@pytest.mark.parametrize(("count", "correction"), [(0, 0), (1, 1), (2, 3.5)])
def test_a_variance_of_too_few_values_is_refused(count, correction):
    with support.refused(ValueError, correction, count):
        Moments(count, [0.0], [0.0]).var(correction)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((-1, [0.0], [0.0]), ValueError, "count"),
        ((True, [0.0], [0.0]), TypeError, "count"),
        ((1.0, [0.0], [0.0]), TypeError, "count"),
        ((1, [0.0], [-1.0]), ValueError, "m2"),
        ((1, [0.0, 0.0], [0.0]), ValueError, "shape"),
        ((1, [[0.0]], [[0.0]]), ValueError, "mean"),
        ((1, ["a"], [0.0]), TypeError, "mean"),
        ((1, [0.0], [1j]), TypeError, "m2"),
    ],
    ids=str,
)
def test_what_moments_cannot_be_is_refused(args, error, words):
    with support.refused(error, words):
        Moments(*args)


def test_moments_do_not_change():
    given = np.ones(2)
    moments = Moments(3, given, given)
    given[0] = 7
    assert moments == Moments(3, [1, 1], [1, 1])
    with pytest.raises(AttributeError):
        moments.count = 4
    for duplicate in (moments, pickle.loads(pickle.dumps(moments))):
        with pytest.raises(ValueError, match="read-only"):
            duplicate.mean[0] = 7


def test_equality_is_by_value_and_equal_moments_have_one_hash(rng):
    moments = Moments.of(some(rng, (4, 3)))
    twin = Moments(moments.count, moments.mean, moments.m2)
    assert twin == moments
    assert hash(twin) == hash(moments)
    assert hash(Moments(1, [0.0], [0.0])) == hash(Moments(1, [-0.0], [0.0]))
    for other in (Moments(5, twin.mean, twin.m2), Moments(4, twin.m2, twin.m2), "moments", None):
        assert other != moments


@pytest.mark.parametrize(
    "moments", [Moments(), Moments(0, [0.0], [0.0]), Moments(7, [0.1, 1e300], [1 / 3, 5e-324])]
)
def test_pickle_and_json_keep_every_bit(tmp_path, moments):
    assert pickle.loads(pickle.dumps(moments)) == moments
    assert Moments.from_dict(json.loads(json.dumps(moments.to_dict()))) == moments
    np.savez(tmp_path / "moments.npz", **moments.to_dict())
    with np.load(tmp_path / "moments.npz") as state:
        assert Moments.from_dict(state) == moments


@pytest.mark.parametrize("state", [{}, {"count": 1, "mean": [0.0]}, {"count": 0, "a": 1}], ids=str)
def test_a_dict_of_other_names_is_refused(state):
    with support.refused(ValueError, "count, mean and m2"):
        Moments.from_dict(state)


def test_the_moments_of_a_sum_over_processes_are_those_of_one(rng):
    parts = [some(rng, (8, 3, 5)) for _ in range(6)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        mapped = list(pool.map(Moments.of, parts))
    assert functools.reduce(Moments.__add__, mapped) == sum(map(Moments.of, parts))


def run_example():
    pytest.importorskip("sklearn")
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_gives_the_same_statistics_in_every_way():
    ways = [line.split("  ", 1)[0].strip() for line in run_example().splitlines()]
    with_dask = importlib.util.find_spec("distributed") is not None
    assert ways[: 2 + with_dask] == ["generator", "processes", "Dask"][: 2 + with_dask]


@pytest.mark.slow
def test_a_tree_of_dask_tasks_on_a_cluster_of_processes_gives_the_whole(rng):
    dask_array = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")
    spec = importlib.util.spec_from_file_location("moments_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    pytest.importorskip("sklearn")
    spec.loader.exec_module(example)
    x = some(rng, (37, 3, 10), np.float32, 100.0, 1.0)
    chunks = dask_array.from_array(x, chunks=(8, -1, 5))
    with (
        # A cluster sets the number of threads of the processes that it starts, and leaves it so.
        unittest.mock.patch.dict(os.environ),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        assert_accurate(example.tree_sum(chunks), x, 6)
