"""What the documentation shows runs, and gives what it says."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_blocks(path):
    """The Python snippets of a Markdown page, padded to its line numbers."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


@pytest.mark.parametrize("with_torch", [False, True])
@pytest.mark.parametrize("page", ["README.md", "docs/interoperation.md"])
def test_snippets_run_in_their_order(page, with_torch):
    if with_torch:
        pytest.importorskip("torch")
    namespace = {}
    for block in python_blocks(ROOT / page):
        if with_torch or "import torch" not in block:
            exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize(
    "name",
    [
        "fastbn.functional",
        "fastbn.layers",
        "fastbn.folding",
        "fastbn.instance",
        "fastbn.moments",
        "fastbn.recalibration",
        "fastbn.sync",
        "fastbn._cpu",
    ],
)
def test_docstring_examples_give_what_they_say(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_public_name_has_a_docstring_with_an_example():
    import fastbn

    functions = [getattr(fastbn.functional, name) for name in fastbn.functional.__all__]
    names = [name for name in fastbn.__all__ if name not in ("__version__", "functional")]
    for thing in functions + [getattr(fastbn, name) for name in names]:
        doc = thing.__doc__ or ""
        assert ">>> " in doc or "see `LazyBatchNorm2d`" in doc, thing
