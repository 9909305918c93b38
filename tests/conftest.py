"""Fixtures of the whole suite, and how it is spread over processes."""

import os
import subprocess
import sys
from pathlib import Path

# Processes that test side by side have a CPU each. This must be said before OpenMP is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

# `reference` and `support` are imported by name, whichever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from internals import core
from support import DTYPES, dtype_of

# The same examples in every run; --hypothesis-profile=explore looks for new ones.
everywhere = hypothesis.settings(database=None, deadline=None)
hypothesis.settings.register_profile("fixed", everywhere, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("explore", everywhere, max_examples=5000)
hypothesis.settings.load_profile("fixed")


SERIAL = pytest.StashKey[list[str]]()  # the tests that workers have left


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave tests that measure to `pytest_sessionfinish`, in a worker of pytest-xdist."""
    if hasattr(config, "workeroutput"):
        left = [item for item in items if item.get_closest_marker("serial")]
        config.workeroutput["serial"] = [
            f"{item.path}::{item.nodeid.partition('::')[2]}" for item in left
        ]
        items[:] = [item for item in items if item.get_closest_marker("serial") is None]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker has ended: take over what it has left."""
    left = getattr(node, "workeroutput", {}).get("serial")  # not there if it has crashed
    if left is not None:
        node.config.stash[SERIAL] = left


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """After all workers have ended, run the tests that measure, with nothing beside them."""
    result = yield
    left = session.config.stash.get(SERIAL, [])
    finished = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED
    if left and session.exitstatus in finished and not session.shouldfail:
        statuses = {session.exitstatus, run_serial(session.config, left)} - {finished[-1]}
        session.exitstatus = max(statuses, default=finished[-1])
    return result


def run_serial(config, tests):
    """Run tests in a process without workers, with the same options; return the exit status."""
    options = [a for a in config.invocation_params.args if a not in config.args]
    command = [sys.executable, "-m", "pytest", *options, "-n0", "-m", "serial", *tests]
    print("\nTests that run alone:", flush=True)
    return subprocess.run(command, cwd=config.invocation_params.dir).returncode


@pytest.fixture(params=[True, False], ids=["quick", "checked"])
def quick(request):
    """Each of the two paths."""
    was_on = core.set_quick_path(request.param)
    yield request.param
    core.set_quick_path(was_on)


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
