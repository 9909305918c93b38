"""The backends have the functions of the protocol, parameter for parameter."""

import inspect

import pytest

from fastbn.backends import cpu
from fastbn.backends.protocol import Backend

CONTRACT = [name for name in vars(Backend) if not name.startswith("_")]


def cuda():
    """The CUDA backend, on a GPU or a simulated one."""
    import gpu

    return gpu.cuda


def parameters(function):
    """Name, kind and default of each parameter but self."""
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("backend", [lambda: cpu, cuda], ids=["cpu", "cuda"])
def test_a_backend_has_the_signatures_of_the_protocol(backend, name):
    assert parameters(getattr(backend(), name)) == parameters(getattr(Backend, name))
