"""The benchmark: fastbn, its peers and the floor that memory sets, each in a process of its own.

`python -m bench` in the repository's root measures. `runner` starts a `worker` process for each of
the `libraries` and asks them in turn; `cases` says what is measured and what is right, `arrays`
where in memory. The results are JSON; `report` makes tables of it, held against `goals`, and
`picture` draws it. `calls` is the cost of a call where arrays are too small to matter.

How processes are asked and samples taken is shared with the benchmark of an installed package,
`fastbn/_selfbench`. Its modules are found as those of a package `_selfbench`, without fastbn, which
may be installed elsewhere and not be built here, and which no library's process but its own loads.
"""

import sys
from pathlib import Path
from types import ModuleType

if "_selfbench" not in sys.modules:  # In the process of a library it is there before.
    _package = ModuleType("_selfbench")
    _package.__path__ = [str(Path(__file__).parents[1] / "fastbn" / "_selfbench")]
    sys.modules["_selfbench"] = _package
