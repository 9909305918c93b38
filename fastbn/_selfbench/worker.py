"""The script of a library's process, which is started by its path: no module of the package.

To import the package would be to import fastbn, and its OpenMP, beside the library. Its modules
are therefore found as those of a package of their own, `_selfbench`.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType


def make_importable() -> None:
    """Let `_selfbench` be this folder, without fastbn around it."""
    package = ModuleType("_selfbench")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["_selfbench"] = package


if __name__ == "__main__":
    make_importable()
    importlib.import_module("_selfbench.serving").main(sys.argv[1])
