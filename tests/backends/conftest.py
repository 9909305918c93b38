"""The backend of a test, and which dtypes wait for the slow tests."""

from pathlib import Path

import backend as backends
import numpy as np
import pytest


@pytest.fixture(params=backends.NAMES)
def backend(request):
    """Each backend that there is, or the one that a test names."""
    with backends.opened(request.param) as backend:
        yield backend


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark slow what is of other dtypes than float32.

    Kernels for a simulated GPU take longer to compile than to test; those of the CPU are tested in
    every dtype elsewhere.
    """
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:  # the hook is called with those of all folders
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        dtype = parameters.get("dtype", parameters.get("half", "float32"))
        if as_dtype(dtype) != np.float32:
            item.add_marker(pytest.mark.slow)


def as_dtype(value):
    """The dtype that a parameter stands for; None for bfloat16, which may not be installed."""
    return None if value == "bfloat16" else np.dtype(value)
