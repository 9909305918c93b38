"""Many cases in one test: each of them runs, and a failure tells which one it was."""

import itertools

import pytest
from cases import each, in_pairs


def test_every_case_begins_with_the_same_numbers(rng):
    drawn = []

    @each("b", [1, 2])
    @each("a, c", {"first": (1, 2), "second": (3, 4)})
    def of(rng, a, b, c):
        drawn.append((a, b, c, rng.random()))

    of(rng=rng)
    assert [case[:3] for case in drawn] == [(1, 1, 2), (3, 1, 4), (1, 2, 2), (3, 2, 4)]
    assert len({case[3] for case in drawn}) == 1


def test_a_failure_names_its_case():
    @each("a", {"one": 1, "two": 2})
    @each("b, c", [(1, len), (2, len)])
    def of(a, b, c):
        assert (a, b) != (2, 1)

    with pytest.raises(AssertionError) as caught:
        of()
    assert caught.value.__notes__ == ["with b, c = (1, len)", "with a = two"]


def test_a_case_that_is_skipped_is_told_after_the_others():
    done = []

    @each("a", [1, 2, 3])
    def of(a):
        done.append(a)
        if a == 2:
            pytest.skip("not here")

    with pytest.raises(pytest.skip.Exception, match="not here"):
        of()
    assert done == [1, 2, 3]


def test_any_two_values_meet_in_a_row_of_few():
    lists = ["abcd", [1, 2, 3], [True, False], [None, 0]]
    rows = in_pairs(*lists)
    assert len(rows) < 20
    for (i, first), (j, second) in itertools.combinations(enumerate(lists), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
