"""Wheels are built here and by a workflow, to the same rules."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution has neither script")
def test_wheels_may_have_the_same_size_wherever_they_are_built():
    """In the script, in the workflow, and in the page, which tells it in kB."""
    script, workflow, page = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in (".ci/wheels", ".github/workflows/wheels.yml", "docs/building.md")
    )
    limits = [int(limit) for text in (script, workflow) for limit in re.findall(r"-lt (\d+)", text)]
    size, limit = re.search(r"has ([\d,]+) kB,\s+of\s+a\s+limit\s+of\s+([\d,]+)", page).groups()
    assert limits == [1000 * int(limit.replace(",", ""))] * 2
    assert int(size.replace(",", "")) * 1000 < limits[0]
