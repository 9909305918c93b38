"""What the tests use of the package beside its public names, all in one place.

A name that moves in the package is put right here. Modules are given as modules, and by their names
where programs import them that run in processes of their own.
"""

from pathlib import Path

import fastbn
from fastbn import _cgroups, _checks, _core, _memory, _selfbench, _threads
from fastbn import backends as _backends

backends, bench, checks = _backends, _selfbench, _checks
core, threads, memory, cgroups = _core, _threads, _memory, _cgroups
CORE, THREADS, CHECKS = core.__name__, threads.__name__, checks.__name__
CUDA, MPI = "fastbn.backends.cuda", "fastbn._mpi"  # not imported before they are needed
PACKAGE = Path(fastbn.__file__).parent
CUDA_SOURCE = PACKAGE / "backends/cuda/kernels.cu"
# What the import of the package leaves to its first use.
AT_FIRST_USE = {
    *(MPI, "fastbn.moments", "fastbn.recalibration", "fastbn.folding", "fastbn._config"),
    *("fastbn.layers.syncbatchnorm", "dataclasses"),
}
# Where the examples of docstrings are.
LAYERS = ["batchnorm", "groupnorm", "instancenorm", "lazy", "state", "syncbatchnorm"]
WITH_EXAMPLES = [
    *("fastbn.functional", "fastbn.moments", "fastbn.folding", "fastbn.recalibration"),
    *("fastbn._config", "fastbn._memory", "fastbn._threads"),
    *(f"fastbn.layers.{name}" for name in LAYERS),
]


def alone_on_its_rank(monkeypatch, communicator):
    """Let a communicator stand for MPI, whose other ranks have nothing to add."""
    for name in ("mpi", "_record_type", "_operation"):
        monkeypatch.setattr(f"{MPI}.{name}", lambda *_: communicator)
