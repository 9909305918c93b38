"""Many cases in one test: pytest takes longer over a test of its own than most cases take."""

import copy
import functools
import inspect
import itertools
from collections.abc import Mapping

import pytest


def each(names, values):
    """Run a test for each of the values, as `parametrize` does, but as one test.

    Values of a mapping are called by its keys. A case that fails is named, and is the last. Every
    case begins with the same state of the fixture `rng`.
    """
    names = names.split(", ")
    labels, values = labelled(values)

    def decorate(test):
        signature = inspect.signature(test)

        @functools.wraps(test)
        def all_cases(**arguments):
            skipped = None
            for label, value in zip(labels, values, strict=True):
                case = dict(zip(names, [value] if len(names) == 1 else value, strict=True))
                try:
                    test(**with_own_rng(arguments), **case)
                except pytest.skip.Exception as reason:
                    skipped = reason
                except BaseException as error:
                    error.add_note(f"with {', '.join(names)} = {label}")
                    raise
            if skipped is not None:
                raise skipped

        left = [p for name, p in signature.parameters.items() if name not in names]
        all_cases.__signature__ = signature.replace(parameters=left)
        return all_cases

    return decorate


def labelled(values):
    """What values are called, and the values."""
    if isinstance(values, Mapping):
        return list(values), list(values.values())
    values = list(values)
    return [label(value) for value in values], values


def label(value):
    """What a value is called: a function by its name."""
    if isinstance(value, tuple):
        return f"({', '.join(map(label, value))})"
    return getattr(value, "__name__", None) or repr(value)


def with_own_rng(arguments):
    """The arguments of a test, with a generator of its own."""
    return {k: copy.deepcopy(v) if k == "rng" else v for k, v in arguments.items()}


def in_pairs(*lists):
    """So few rows of values, one from each list, that any two of two lists are once in a row."""
    rows = list(itertools.product(*(range(len(values)) for values in lists)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(rows, key=lambda row: len(pairs[row] & left))
        left -= pairs[best]
        chosen.append(tuple(values[i] for values, i in zip(lists, best, strict=True)))
    return chosen
