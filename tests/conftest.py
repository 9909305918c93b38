"""Fixtures of the whole suite."""

import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# `reference` and `support` are imported by name, whichever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from support import DTYPES, dtype_of

# The same examples in every run; --hypothesis-profile=explore looks for new ones.
everywhere = hypothesis.settings(database=None, deadline=None)
hypothesis.settings.register_profile("fixed", everywhere, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("explore", everywhere, max_examples=5000)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def rng():
    """A generator with the same seed in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture(params=DTYPES)
def dtype(request):
    """Each of the four dtypes; bfloat16 only where ml_dtypes is installed."""
    return dtype_of(request.param)


@pytest.fixture(params=["bfloat16", "float16"])
def half(request):
    """Each of the two 16-bit dtypes."""
    return dtype_of(request.param)


@pytest.fixture
def set_num_threads():
    """`fastbn.set_num_threads`, put back to its default after the test."""
    import fastbn

    yield fastbn.set_num_threads
    fastbn.set_num_threads(None)


@pytest.fixture
def device(request):
    """The first GPU or the one that a test names; what a test writes beyond its arrays fails it."""
    from gpu import SIMULATED, cupy

    with cupy.cuda.Device(getattr(request, "param", 0)) as device:
        yield device
    if SIMULATED:
        assert not cupy.cuda.memory.check_all()
