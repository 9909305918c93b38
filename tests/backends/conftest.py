"""The backend of a test, and what of the kernels for a GPU waits for the slow tests."""

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
    """Mark slow what needs kernels of other dtypes than float32 on a GPU.

    Where the GPU is simulated, kernels of a dtype take longer to compile than to test.
    """
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        dtype = parameters.get("dtype", parameters.get("half", "float32"))
        if parameters.get("backend") != "cpu" and np.dtype(np.float32) != as_dtype(dtype):
            item.add_marker(pytest.mark.slow)


def as_dtype(value):
    """The dtype that a parameter stands for; None for bfloat16, which may not be installed."""
    return None if value == "bfloat16" else np.dtype(value)
