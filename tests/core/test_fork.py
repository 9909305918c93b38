"""A forked process can call the library, whatever its parent did before."""

import os

import pytest
from internals import CORE
from support import IN_CHILD, beside_another_runtime, output_of

pytestmark = [
    pytest.mark.wheel,
    pytest.mark.serial,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]

# Large enough for two threads.
CODE = """
import multiprocessing, threading
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((8, 16, 64, 64), dtype=np.float32)
fastbn.set_num_threads(2)

def total(_=None):
    bn = fastbn.BatchNorm2d(16)
    return float(np.abs(bn(x)).sum() + np.abs(bn.backward(x)).sum())

def in_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]

def right():
    return total() == expected
"""

# What a single-threaded process computes is what all others must.
EXPECTED = """
fastbn.set_num_threads(1)
expected = total()
fastbn.set_num_threads(2)
"""

ORDERS = {
    "no call before": "in_child(right)",
    "a call before": "right() and in_child(right) and right()",
    "a call before, none in the child": "right() and in_child(lambda: True) and right()",
    "children in turn": "right() and all([in_child(right) for _ in range(3)]) and right()",
    "a child of a child": "right() and in_child(lambda: right() and in_child(right) and right())",
    "a child of a child without calls": "right() and in_child(lambda: in_child(right))",
    "from a thread": "right() and in_thread(lambda: in_child(right)) and right()",
    "from a thread that has called": "in_thread(lambda: right() and in_child(right)) and right()",
    "calls of a thread, fork of another": "in_thread(right) and in_child(right) and right()",
    "calls of both threads": "right() and in_thread(lambda: right() and in_child(right))",
    "a thread of the child": "right() and in_child(lambda: in_thread(right) and right())",
}

POOL = """
def pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(total, range(4)) == [expected] * 4
"""


def prints_true(code, folder, **environment):
    code = IN_CHILD + CODE + EXPECTED + POOL + f"print({code})"
    return output_of(code, folder, **environment) == "True\n"


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_parallel_call_works_after_a_fork(tmp_path, order):
    assert prints_true(order, tmp_path)


@pytest.mark.parametrize("order", ["pool()", "right() and pool() and pool() and right()"])
def test_a_parallel_call_works_in_a_pool(tmp_path, order):
    assert prints_true(order, tmp_path)


ENVIRONMENTS = [
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "3"},
    {"OMP_PROC_BIND": "true"},
    {"OMP_PROC_BIND": "spread", "OMP_NUM_THREADS": "2"},
    {"OMP_WAIT_POLICY": "active"},
    {"OMP_DYNAMIC": "true"},
]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_a_parallel_call_works_after_a_fork_under_settings_of_openmp(tmp_path, environment):
    order = "right() and in_child(lambda: right() and in_child(right)) and pool() and right()"
    code = f"fastbn.set_num_threads(None) or ({order})"
    assert prints_true(code, tmp_path, **environment)


def test_a_fork_while_another_thread_calls(tmp_path):
    code = """
stop = threading.Event()

def calls():
    while not stop.is_set():
        assert right()

threads = [threading.Thread(target=calls) for _ in range(2)]
for thread in threads:
    thread.start()
children = [in_child(right) for _ in range(10)]
stop.set()
for thread in threads:
    thread.join()
print(all(children) and right())
"""
    assert output_of(IN_CHILD + CODE + EXPECTED + code, tmp_path) == "True\n"


# As torch loads the runtime that it brings along: its symbols come before those of all others.
LOAD_ANOTHER_RUNTIME = f"""
import ctypes, shutil
import {CORE} as core

def another_runtime():
    ours = core.platform()["openmp"].partition("(")[2].rstrip(")")
    ctypes.CDLL(shutil.copy(ours, os.path.abspath("another.so")), ctypes.RTLD_GLOBAL)
    return True
"""


@beside_another_runtime
@pytest.mark.parametrize(
    "order",
    [
        "another_runtime() and right() and in_child(right) and right()",
        "right() and another_runtime() and in_child(right) and right()",
        "right() and another_runtime() and right() and pool() and right()",
    ],
)
def test_a_fork_beside_another_openmp_runtime(tmp_path, order):
    code = IN_CHILD + CODE + LOAD_ANOTHER_RUNTIME + EXPECTED + POOL + f"print({order})"
    assert output_of(code, tmp_path) == "True\n"


# As a repaired wheel's runtime is beside that of a torch that was imported later.
BORROW_THREADS = """
def borrows():
    ours = core.platform()["openmp"].partition("(")[2].rstrip(")")
    other = shutil.copy(ours, os.path.abspath("other.so"))
    if core.borrow_threads(other) or not core.borrow_threads(ours):
        return False  # of a library that is not loaded, or not of the own one
    ctypes.CDLL(other)
    return core.borrow_threads(other) and other in core.platform()["openmp"]

def started(call):
    before = len(os.listdir("/proc/self/task"))
    assert call()
    return len(os.listdir("/proc/self/task")) - before
"""


@beside_another_runtime
@pytest.mark.parametrize("called_before", [False, True])
def test_borrowed_threads_work_and_a_fork_ends_them(tmp_path, called_before):
    code = IN_CHILD + CODE + LOAD_ANOTHER_RUNTIME + EXPECTED + BORROW_THREADS
    code += f"""
assert not {called_before} or right()
assert borrows()
print(started(right), started(right), core.omp_pause(), started(right), in_child(right), right())
"""
    assert output_of(code, tmp_path) == "1 0 True 1 True True\n"
