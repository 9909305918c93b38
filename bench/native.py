"""Compiles the C files of the benchmark for this machine, when they are needed."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from _selfbench.serving import Unsupported

HERE = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


def compiler() -> list[str]:
    """The C compiler as a command."""
    return shlex.split(os.environ.get("CC", "cc"))


def load(source: str, *flags: str) -> ctypes.CDLL:
    """Compile a C file of this folder into a shared library, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "library.so")
        command = [*compiler(), *FLAGS, str(HERE / source), "-o", str(path), *flags]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise Unsupported(f"no C compiler: {error}") from None
        except subprocess.CalledProcessError as error:
            raise Unsupported(f"{source} does not compile: {error.stderr[-400:]}") from None
        return ctypes.CDLL(str(path))
