"""A forked process can call the library, whatever its parent did before."""

import os

import pytest
from support import output_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# Large enough for two threads.
CODE = """
import multiprocessing, os
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((8, 16, 64, 64), dtype=np.float32)
fastbn.set_num_threads(2)

def total(_=None):
    return float(np.abs(fastbn.BatchNorm2d(16)(x)).sum())
"""
POOL = """
expected = total()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(total, range(4)) == [expected] * 4, total() == expected)
"""
CHILD_OF_CHILD = """
expected = total()
for _ in range(2):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        break
    assert total() == expected
else:
    os._exit(0)
print(total() == expected)
"""


# A process that hangs is killed after a minute, which fails the test.
@pytest.mark.parametrize("code", [POOL, CHILD_OF_CHILD], ids=["pool", "child of a child"])
@pytest.mark.parametrize("threads", [None, "1", "3"])
def test_a_parallel_call_works_after_a_fork(tmp_path, code, threads):
    output = output_of(CODE + code, tmp_path, OMP_NUM_THREADS=threads)
    assert "False" not in output
    assert "True" in output
