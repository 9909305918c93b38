"""The same bits of everything for every instruction set, number of threads and process."""

from pathlib import Path

import fingerprint
import pytest
from internals import core
from support import output_of

pytestmark = pytest.mark.slow


def fingerprints(folder, **environment):
    """The hashes that a process of its own prints, by what they are of."""
    tests = str(Path(fingerprint.__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r}); import fingerprint"
    code += "; fingerprint.every = 3; fingerprint.main()"
    lines = output_of(code, folder, **environment).splitlines()
    shown = dict(line.split(": ") for line in lines if line.startswith(("instruction", "threads")))
    hashes = [line.split(" ", 1) for line in lines if line.endswith(tuple(fingerprint.DTYPES))]
    return shown, {name: value for value, name in hashes}


@pytest.fixture(scope="module")
def expected_fingerprints(tmp_path_factory):
    return fingerprints(tmp_path_factory.mktemp("base"), FASTBN_ISA="base", OMP_NUM_THREADS="1")[1]


@pytest.mark.parametrize("isa", core.platform()["isas"][1:] or ["base"])
def test_every_instruction_set_number_of_threads_and_process_gives_the_same_bits(
    tmp_path, expected_fingerprints, isa
):
    shown, hashes = fingerprints(tmp_path, FASTBN_ISA=isa, OMP_NUM_THREADS="3")
    assert shown["instruction set"].startswith(isa)
    assert hashes == expected_fingerprints
