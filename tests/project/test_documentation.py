"""What the documentation shows runs, and gives what it says; where it points, something is."""

import ast
import contextlib
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
from internals import WITH_EXAMPLES
from snippets import python_blocks, run_page

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES = [page.relative_to(ROOT).as_posix() for page in PAGES if "_build" not in page.parts]
OF_TORCH = "docs/reference/torch.rst"
WITH_SNIPPETS = [page for page in PAGES if any(python_blocks(ROOT / page))]


# With it, snippets that import CuPy run where there is no GPU.
with contextlib.suppress(pytest.skip.Exception):
    importlib.import_module("gpu")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.torch
@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = run_page(ROOT / page)
    if missing:
        pytest.skip(f"all but those for {', '.join(sorted(missing))} have run")


@pytest.mark.parametrize("page", PAGES)
def test_no_snippet_escapes_the_tests(page):
    """Every fence names a language, and only Python's are programs."""
    fences = re.findall(r"^ *```([^\n]*)\n.*?^ *```$", read(page), re.MULTILINE | re.DOTALL)
    languages = {fence.split()[0] if fence else "none" for fence in fences}
    assert languages <= {"python", "sh", "text", "yaml", "{toctree}", "{include}"}


def prose(page):
    """A page without its fences."""
    return re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub and Sphinx make of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution lacks some targets")
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if not path.startswith("https:"):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_sdist():
    manifest = (ROOT / "MANIFEST.in").read_text()
    for page in PAGES:
        if not page.startswith("docs/") and page != "README.md":  # which are there anyway
            assert page in manifest


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_give_what_they_say(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def public():
    """The public names, of the package and of its functions, and what they stand for."""
    import fastbn

    for name in fastbn.functional.__all__:
        yield f"functional.{name}", getattr(fastbn.functional, name)
    for name in fastbn.__all__:
        if name not in ("__version__", "functional"):
            yield name, getattr(fastbn, name)


def test_every_public_name_has_a_docstring_with_an_example():
    for name, thing in public():
        doc = thing.__doc__ or ""
        assert ">>> " in doc or "see `LazyBatchNorm2d`" in doc, name


def test_every_public_name_is_in_the_reference():
    pages = set((ROOT / "docs/reference").glob("*.rst")) - {ROOT / OF_TORCH}
    assert documented(*pages) == {name.rpartition(".")[2] for name, _ in public()}


def documented(*pages):
    """The names that pages of the reference take from docstrings."""
    text = "".join(page.read_text() for page in pages)
    return set(re.findall(r"^\.\. auto(?:class|function):: (\w+)", text, re.MULTILINE))


@pytest.mark.torch
def test_every_public_name_under_torch_is_in_the_reference():
    """With torch's signatures, which the pages are built without."""
    torch, accelerated = pytest.importorskip("torch"), pytest.importorskip("fastbn.torch")
    names = {*accelerated.__all__, *accelerated.functional.__all__} - {"functional"}
    assert documented(ROOT / OF_TORCH) == names
    signature = inspect.signature(torch.nn.BatchNorm2d)
    parameters = ", ".join(str(p).replace(" ", "") for p in untyped(signature))
    shown = re.search(r"autoclass:: BatchNorm2d\((.+)\)$", read(OF_TORCH), re.MULTILINE)[1]
    assert shown.replace("*, ", "").replace(" ", "") == parameters.replace(" ", "")


def untyped(signature):
    """Parameters without annotations."""
    return [p.replace(annotation=p.empty) for p in signature.parameters.values()]


TRANSLATIONS = [page for page in PAGES if page.endswith(".zh-CN.md")]


@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_translations_show_the_same_programs(translation):
    """Their comments differ, which the syntax tree does not have."""
    page = translation.replace(".zh-CN", "")
    programs, translated = (
        [ast.dump(ast.parse(block)) for block in python_blocks(ROOT / name)]
        for name in (page, translation)
    )
    assert translated == programs


def numbers(text):
    return re.findall(r"\d+(?:[.,]\d+)*", text)


@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_translations_tell_the_same_numbers(translation):
    """Row by row in tables, where another language may put them in another order."""
    page, translated = prose(translation.replace(".zh-CN", "")), prose(translation)
    rows, translated_rows = (
        [sorted(numbers(row)) for row in re.findall(r"^\|.*$", text, re.MULTILINE)]
        for text in (page, translated)
    )
    assert translated_rows == rows
    assert set(numbers(translated)) == set(numbers(page))
