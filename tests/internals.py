"""What the tests use of the package beside its public names, all in one place.

A name that moves in the package is put right here. Modules are given as modules, and by their names
where programs import them that run in processes of their own.
"""

from pathlib import Path

import fastbn
from fastbn import _backends, _bench, _core, _cpu

backends, bench, core, threads = _backends, _bench, _core, _cpu
CORE, THREADS = core.__name__, threads.__name__
CUDA, MPI = "fastbn._cuda", "fastbn._mpi"  # not imported before they are needed
PACKAGE = Path(fastbn.__file__).parent
CUDA_SOURCE = PACKAGE / "_cuda.cu"
BENCH_WORKER = PACKAGE / "_bench_worker.py"
# What the import of the package leaves to its first use.
AT_FIRST_USE = {MPI, "fastbn.recalibration"}
# Where the examples of docstrings are.
WITH_EXAMPLES = [
    *("fastbn.functional", "fastbn.layers", "fastbn.folding", "fastbn.instance"),
    *("fastbn.moments", "fastbn.recalibration", "fastbn.sync", "fastbn._cpu"),
]


def alone_on_its_rank(monkeypatch, communicator):
    """Let a communicator stand for MPI, whose other ranks have nothing to add."""
    for name in ("mpi", "_record_type", "_operation"):
        monkeypatch.setattr(f"{MPI}.{name}", lambda *_: communicator)
