"""The backends, as the contract suite sees them: what makes arrays, and takes them to the host."""

import contextlib
import importlib
from contextlib import contextmanager

import numpy as np
import pytest


class Backend:
    """Arrays of NumPy, or of CuPy on a device."""

    def __init__(self, xp, device):
        self.xp, self.device = xp, device

    def array(self, a):
        """A new array of the same values; strides too, if they are those of a dense array."""
        return self.xp.array(a, order="K")

    def host(self, a):
        """A copy as an array of NumPy's."""
        return np.array(a) if isinstance(a, np.ndarray) else a.get()


@contextmanager
def opened(name):
    """The backend of a name, cpu or cuda:N; what is written beyond its arrays fails the test."""
    if name == "cpu":
        yield Backend(np, name)
        return
    from gpu import SIMULATED, cupy

    with cupy.cuda.Device(int(name.removeprefix("cuda:"))):
        yield Backend(cupy, name)
    if SIMULATED:
        assert not cupy.cuda.memory.check_all()


# Whether the GPU is a simulated one, or None where there is none.
SIMULATED = None
with contextlib.suppress(pytest.skip.Exception):
    SIMULATED = importlib.import_module("gpu").SIMULATED
NAMES = ["cpu"] if SIMULATED is None else ["cpu", "cuda:0"]


def by_shape(*shapes, pieces=(), large=()):
    """Parametrizes by backend and shape.

    `pieces` are of channels that a device without clusters of blocks sums in pieces, which is the
    second of the simulated ones; `large` are too large for a simulation.
    """
    cases = [("cpu", shape) for shape in (*shapes, *pieces)]
    if SIMULATED:
        cases += [("cuda:0", shape) for shape in shapes] + [("cuda:1", shape) for shape in pieces]
    elif SIMULATED is not None:
        cases += [("cuda:0", shape) for shape in (*shapes, *large)]
    ids = [f"{shape}-{name}" for name, shape in cases]
    return pytest.mark.parametrize(("backend", "shape"), cases, indirect=["backend"], ids=ids)


# Arrays of a backend with the values of an array of NumPy's, laid out differently.


def contiguous(backend, a):
    return backend.xp.array(a, order="C")


def channels_last(backend, a):
    moved = np.ascontiguousarray(np.moveaxis(a, 1, -1))
    return backend.xp.moveaxis(backend.array(moved), -1, 1)


def odd_offset(backend, a):
    """Contiguous, but not from a multiple of 16 bytes on."""
    view = backend.xp.zeros(a.size + 1, a.dtype)[1:].reshape(a.shape)
    view[...] = backend.array(a)
    return view


def odd_offset_channels_last(backend, a):
    moved = np.ascontiguousarray(np.moveaxis(a, 1, -1))
    return backend.xp.moveaxis(odd_offset(backend, moved), -1, 1)


def sliced(backend, a):
    buffer = backend.xp.zeros([2 * n + 1 for n in a.shape], a.dtype)
    view = buffer[(slice(1, None, 2),) * a.ndim]
    view[...] = backend.array(a)
    return view


DENSE = [contiguous, channels_last]
LAYOUTS = [*DENSE, odd_offset, odd_offset_channels_last, sliced]
