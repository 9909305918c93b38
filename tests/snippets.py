"""The snippets of Markdown pages, and how they run.

``python tests/snippets.py docs/quickstart.md`` runs those of a page in an empty folder, with
nothing but what they import themselves.
"""

import contextlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What a snippet may import that is not installed, or has no device, everywhere.
OPTIONAL = ("torch", "safetensors", "ml_dtypes", "cupy", "onnx")
RANKS = re.compile(r"# mpiexec -n (\d+) python")
MPIEXEC = Path(sys.executable).with_name("mpiexec")


def python_blocks(path):
    """The Python snippets of a Markdown page, padded to its line numbers."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


def run_page(path):
    """Runs the snippets in their order, in one namespace; returns what was not to be had for some.

    One that begins with a command for ranks of MPI runs by that command, by itself.
    """
    namespace = {"__name__": "__main__"}
    missing = set()
    for block in python_blocks(path):
        absent = [name for name in OPTIONAL if imports(block, name) and not is_there(name)]
        ranks = RANKS.match(block.lstrip("\n"))
        if ranks and not MPIEXEC.exists():
            absent.append("mpiexec")
        missing.update(absent)
        if not absent and ranks:
            command = [MPIEXEC, "-n", ranks[1], sys.executable, "-m", "mpi4py", "-c", block]
            subprocess.run(command, check=True, timeout=60)
        elif not absent:
            exec(compile(block, str(path), "exec"), namespace)
    return missing


def imports(block, name):
    """Tell whether a snippet imports a module."""
    return re.search(rf"^(import|from) {name}\b", block, re.MULTILINE) is not None


def is_there(name):
    """Tell whether a module can be imported and, if it is for a GPU, finds one."""
    if importlib.util.find_spec(name) is None:
        return False
    if name != "cupy":
        return True
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


if __name__ == "__main__":
    pages = [Path(page).resolve() for page in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for page in pages:
            run_page(page)
