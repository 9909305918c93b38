"""The bounds that docs/accuracy.md states, on a quick part of what it measures."""

import accuracy
import numpy as np
import pytest
import reference
import support

pytestmark = pytest.mark.isa

QUICK = accuracy.SHAPES[1:3]


@pytest.mark.parametrize("layout", accuracy.LAYOUTS)
@pytest.mark.parametrize("distribution", accuracy.DISTRIBUTIONS)
def test_errors_are_within_their_bounds(dtype, distribution, layout):
    errors = accuracy.measure(accuracy.step_of_fastbn, distribution, dtype, layout, QUICK)
    if errors is None:
        pytest.skip(f"{dtype} cannot hold {distribution}")
    bounds = accuracy.bounds(dtype, distribution)
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("name", support.DTYPES)
def test_the_page_states_the_bounds_and_keeps_to_them(name):
    lines = accuracy.PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {name} |"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 :]]
    stated = [float(cell) for cell in rows[0][2:]]
    assert stated == list(accuracy.bounds(support.dtype_of(name)).values())
    for distribution, _, *row in rows[1 : next(i for i, cells in enumerate(rows) if not cells)]:
        allowed = accuracy.bounds(support.dtype_of(name), distribution).values()
        assert all(float(cell.split()[0]) <= b for cell, b in zip(row, allowed, strict=True))


def test_an_exact_result_has_no_error_and_a_neighbour_one_ulp():
    ones = np.ones(1, "float32")
    next_one = np.nextafter(ones, ones + 1)
    wide = reference.wide(ones)
    assert accuracy.largest_error(ones, wide, wide, ones.dtype, wide) == 0
    assert accuracy.largest_error(next_one, wide, wide, ones.dtype, wide) == 1
