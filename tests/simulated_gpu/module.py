"""Kernels that a host compiler compiles, once for each set of options, and their launches."""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILER = "g++"
HERE = Path(__file__).parent
HEADERS = "scheduler.h", "language.h"
SANITIZED = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "__asan_poison_memory_region")
# Without contraction to fused multiply-add, unless a test asks for it: compilers for GPUs contract,
# and the contract holds either way. The last keeps the shared memory of different libraries apart.
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-U_FORTIFY_SOURCE"]
FLAGS += ["-ffp-contract=off", "-fno-gnu-unique"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if SANITIZED:
    FLAGS += ["-g1", *SANITIZERS]


def cache():
    """The folder of compiled modules, of this user."""
    folder = Path(tempfile.gettempdir(), f"simulated-gpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def compiled(name, make, *inputs):
    """The file that a command makes of inputs, from the cache if it has been made before."""
    key = hashlib.sha256(repr((inputs, FLAGS)).encode()).hexdigest()[:32]
    path = cache() / f"{key}-{name}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            command = [COMPILER, *FLAGS, *make(Path(work)), "-o", Path(work, name)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{COMPILER}: {done.stderr}")
            os.replace(Path(work, name), path)
    return path


def texts(*names):
    return [HERE.joinpath(name).read_text() for name in names]


def scheduler():
    """What runs the threads, compiled."""
    command = ["-O2", "-c", HERE / "scheduler.cpp"]
    return compiled("scheduler.o", lambda _: command, texts("scheduler.cpp", *HEADERS))


@functools.cache
def library(code, options):
    """The library of a source, compiled with options."""

    def make(work):
        source = work / "source.cu"
        source.write_text(code)
        defined = [f'-DSOURCE="{source}"', f"-I{HERE}", *options]
        return ["-shared", *defined, HERE / "module.cpp", scheduler()]

    inputs = code, options, scheduler().name, texts("module.cpp", *HEADERS)
    loaded = ctypes.CDLL(str(compiled("module.so", make, *inputs)))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


kernels = {}  # by their addresses


class Kernel:
    """A kernel of a library, and what it may ask for."""

    def __init__(self, library, name, cluster):
        self.library, self.name, self.cluster = library, name, cluster
        self.address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        self.shared_bytes = 48 << 10
        self.non_portable = False
        kernels[self.address] = self

    def launch(self, blocks, rows, threads, shared_bytes, job, schedule):
        """Run all blocks; raise RuntimeError where the kernel or the launch breaks a rule."""
        what = f"{self.name} in {rows} rows of {blocks} blocks of {threads} threads"
        limits = ((threads, 1024), (blocks, 2**31 - 1), (rows, 65535))
        if threads % 32 or not all(0 < number <= most for number, most in limits):
            raise RuntimeError(f"{what}: no grid of whole warps")
        if blocks % self.cluster or (self.cluster > 8 and not self.non_portable):
            raise RuntimeError(f"{what}: no grid of clusters of {self.cluster}")
        if shared_bytes > self.shared_bytes:
            raise RuntimeError(f"{what}: {shared_bytes} bytes of shared memory")
        unsigned = map(ctypes.c_uint, (blocks, rows, threads, shared_bytes, schedule))
        pointers = map(ctypes.c_void_p, (self.address, job))
        wrong = self.library.launch(*pointers, *unsigned)
        if wrong:
            raise RuntimeError(f"{what}: {wrong.decode()}")
