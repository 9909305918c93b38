"""Threads, the configuration that is shown, and the instruction sets."""

import importlib.metadata
import os
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import THREADS, output_of, run_python, some

import fastbn
import fastbn._core

GET = "import fastbn; print(fastbn.get_num_threads())"
ISAS = ["base", "avx2", "avx512"]


def config(capsys):
    fastbn.show_config()
    return capsys.readouterr().out


@pytest.mark.parametrize("threads", THREADS)
def test_the_number_that_was_set_is_what_one_gets(set_num_threads, threads):
    set_num_threads(threads)
    assert fastbn.get_num_threads() == threads


def test_more_threads_than_cores_may_be_set(rng, set_num_threads):
    set_num_threads(4 * os.cpu_count() + 1)
    assert fastbn.get_num_threads() == 4 * os.cpu_count() + 1
    fastbn.BatchNorm2d(8)(some(rng, (16, 8, 56, 56)))


def test_an_absurd_number_of_threads_is_harmless(rng, set_num_threads):
    set_num_threads(2**40)
    fastbn.BatchNorm2d(8)(some(rng, (2, 8, 5, 5)))


def test_none_is_the_default_again(set_num_threads):
    default = fastbn.get_num_threads()
    set_num_threads(default + 3)
    set_num_threads(None)
    assert fastbn.get_num_threads() == default


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "2", [2], True])
def test_anything_else_is_refused(set_num_threads, value):
    set_num_threads(3)
    with pytest.raises((ValueError, TypeError)):
        set_num_threads(value)
    assert fastbn.get_num_threads() == 3


needs_openmp = pytest.mark.skipif(
    fastbn._core.platform()["openmp"] == "none", reason="a build without OpenMP"
)


@needs_openmp
@pytest.mark.parametrize("threads", [1, 3])
def test_omp_num_threads_is_respected(tmp_path, threads):
    assert int(output_of(GET, tmp_path, OMP_NUM_THREADS=str(threads))) == threads


@needs_openmp
def test_none_goes_back_to_omp_num_threads(tmp_path):
    code = "import fastbn; fastbn.set_num_threads(5); fastbn.set_num_threads(None);" + GET
    assert int(output_of(code, tmp_path, OMP_NUM_THREADS="3")) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_mask_is_respected(tmp_path):
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);" + GET
    assert int(output_of(code, tmp_path)) == 1


def test_there_are_no_more_threads_than_cores_by_default(tmp_path):
    assert 1 <= int(output_of(GET, tmp_path)) <= os.cpu_count()


def test_setting_threads_leaves_the_environment_alone(tmp_path):
    code = (
        "import os; before = dict(os.environ); import fastbn; fastbn.set_num_threads(3);"
        "print(dict(os.environ) == before)"
    )
    assert output_of(code, tmp_path).strip() == "True"


def test_show_config_names_what_is_in_use(capsys, set_num_threads):
    set_num_threads(37)
    shown = config(capsys)
    assert importlib.metadata.version("fastbn") in shown
    assert "37" in shown
    for word in ("compiler", "openmp", "instruction set", "threads"):
        assert word in shown.lower()
    assert any(isa in shown for isa in ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_show_config_names_the_instruction_set_that_was_asked_for(tmp_path, isa):
    done = run_python("import fastbn; fastbn.show_config()", tmp_path, FASTBN_ISA=isa)
    if isa != "base" and done.returncode:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    assert isa in done.stdout


def test_an_unknown_instruction_set_is_an_import_error_that_names_those_there_are(tmp_path):
    done = run_python("import fastbn", tmp_path, FASTBN_ISA="mmx")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError")
    assert "mmx" in error
    assert "base" in error


def test_an_instruction_set_that_the_machine_lacks_is_an_import_error(tmp_path):
    if platform.machine() not in ("x86_64", "AMD64"):
        lacking = "avx2"
    else:
        lacking = next((isa for isa in ISAS if not available(isa, tmp_path)), None)
        if lacking is None:
            pytest.skip("this machine has every instruction set")
    done = run_python("import fastbn", tmp_path, FASTBN_ISA=lacking)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError")
    assert lacking in error
    assert "base" in error


def available(isa, folder):
    return run_python("import fastbn", folder, FASTBN_ISA=isa).returncode == 0


def test_many_python_threads_may_call_at_once(rng):
    x = some(rng, (8, 6, 20, 20))
    expected = fastbn.BatchNorm2d(6)(x)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda _: fastbn.BatchNorm2d(6)(x), range(64))
        assert all(np.array_equal(y, expected) for y in results)
