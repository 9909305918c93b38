"""Threads, the configuration that is shown, and the instruction sets."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import internals
import numpy as np
import pytest
import support
from support import THREADS, output_of, run_python, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.wheel, pytest.mark.serial]

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
    internals.core.platform()["openmp"] == "none", reason="a build without OpenMP"
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


CGROUPS = {
    "version 2": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "version 2, whole CPUs": ("0::/", {"cpu.max": "300000 100000"}, 3),
    "version 2, a fraction": ("0::/", {"cpu.max": "10000 100000"}, 1),
    "version 2, no limit": ("0::/", {"cpu.max": "max 100000"}, None),
    "version 2, of its own": ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, 2),
    "version 2, above": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "1 1"}, 1),
    "version 2, the least": ("0::/a/b", {"a/b/cpu.max": "4 1", "a/cpu.max": "2 1"}, 2),
    "version 2, another's": ("0::/a", {"b/cpu.max": "1 1"}, None),
    "version 2, path unseen": ("0::/host/path", {"cpu.max": "2 1"}, 2),
    "version 1": ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "250000"}, 3),
    "version 1, no limit": ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1"}, None),
    "version 1, of its own": ("4:cpuacct,cpu:/a", {"cpu/a/cpu.cfs_quota_us": "200000"}, 2),
    "version 1, path unseen": ("4:cpu:/host/path", {"cpu/cpu.cfs_quota_us": "100000"}, 1),
    "version 1, another controller": ("4:memory:/a", {"cpu/a/cpu.cfs_quota_us": "100000"}, None),
    "no list of cgroups": (None, {"cpu.max": "2 1"}, 2),
    "nothing": (None, {}, None),
    "damaged": ("0::/a", {"cpu.max": "many", "a/cpu.max": "", "cpu/cpu.cfs_quota_us": "?"}, None),
}


@pytest.mark.parametrize(("of_process", "files", "cpus"), CGROUPS.values(), ids=CGROUPS)
def test_the_quota_of_the_cgroup_is_respected(tmp_path, monkeypatch, of_process, files, cpus):
    if of_process is not None:
        write(tmp_path / "proc/self/cgroup", of_process + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        write(path, text + "\n")
        if path.name == "cpu.cfs_quota_us":
            write(path.with_name("cpu.cfs_period_us"), "100000\n")
    quota = internals.cgroups.cpu_quota(str(tmp_path))
    assert quota == (internals.cgroups.NO_LIMIT if cpus is None else cpus)
    monkeypatch.setattr(internals.threads, "cpu_quota", lambda: quota)
    assert internals.threads.granted_cpus()["cgroup"] == quota


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.torch
@needs_openmp
@pytest.mark.parametrize("imports", ["", "import torch", "torch afterwards"])
def test_threadpoolctl_limits_the_threads(tmp_path, imports):
    pytest.importorskip("threadpoolctl")
    if imports:
        pytest.importorskip("torch")
    before, after = ("", "import torch") if imports == "torch afterwards" else (imports, "")
    code = f"""
{before}
import threadpoolctl
import fastbn
{after}
assert "openmp" in [pool["user_api"] for pool in threadpoolctl.threadpool_info()]
print(fastbn.get_num_threads())
with threadpoolctl.threadpool_limits(1):
    print(fastbn.get_num_threads())
print(fastbn.get_num_threads())
"""
    assert output_of(code, tmp_path, OMP_NUM_THREADS="2").split() == ["2", "1", "2"]


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


def test_show_config_returns_what_it_prints(capsys):
    dicts = fastbn.show_config("dicts")
    assert capsys.readouterr().out == ""
    shown = config(capsys)
    for name in ("version", "compiler", "openmp", "instruction_set", "threads", "threads_reason"):
        assert str(dicts[name]) in shown
    assert dicts["threads"] == fastbn.get_num_threads()
    assert dicts["instruction_set"] in dicts["instruction_sets"]


@pytest.mark.parametrize("mode", ["stderr", None])
def test_show_config_refuses_another_mode(mode):
    with pytest.raises(ValueError, match="'dicts'"):
        fastbn.show_config(mode)


REASON = "import fastbn; print(fastbn.show_config('dicts')['threads_reason'])"


@needs_openmp
@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        ("", {"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS=3"),
        ("import fastbn; fastbn.set_num_threads(3)", {"OMP_NUM_THREADS": "2"}, "set_num_threads"),
        (
            "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])",
            {},
            f"1 of {os.cpu_count()} CPUs are in the affinity mask",
        ),
        (
            "import fastbn, threadpoolctl; limits = threadpoolctl.threadpool_limits(1)",
            {"OMP_NUM_THREADS": "2"},
            "changed in the OpenMP runtime since the import, as threadpoolctl does",
        ),
        (
            f"import {internals.THREADS} as threads\n"
            "threads._granted = {'affinity': 9, 'cgroup': 1}\n"
            "threads._cpus = 1; threads.tell_core()",
            {},
            "the cgroup grants 1 CPUs, rounded up",
        ),
        (
            f"import {internals.THREADS} as threads; threads._limit = 1; threads.tell_core()",
            {},
            "forked from a process whose threads could not be ended",
        ),
    ],
    ids=["OMP_NUM_THREADS", "set_num_threads", "affinity", "threadpoolctl", "cgroup", "fork"],
)
def test_show_config_tells_why_so_many_threads(tmp_path, before, environment, reason):
    if "affinity" in before and not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity masks here")
    if "threadpoolctl" in before:
        pytest.importorskip("threadpoolctl")
    assert output_of(f"{before}\n{REASON}", tmp_path, **environment).strip() == reason


@needs_openmp
@pytest.mark.parametrize("value", ["abc", "0", "-1", "2x", "1.5", "", "3,", "3,0", "9" * 20])
def test_show_config_tells_that_omp_num_threads_is_not_used(tmp_path, value):
    default = output_of(REASON, tmp_path).strip()
    reason = output_of(REASON, tmp_path, OMP_NUM_THREADS=value).strip()
    assert reason == f"{default}; OMP_NUM_THREADS={value} is not a positive number"


@needs_openmp
@pytest.mark.parametrize("value", ["3,2", " +3 , 2"])
def test_omp_num_threads_may_be_a_list(tmp_path, value):
    assert int(output_of(GET, tmp_path, OMP_NUM_THREADS=value)) == 3
    assert output_of(REASON, tmp_path, OMP_NUM_THREADS=value) == f"OMP_NUM_THREADS={value}\n"


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


def test_a_limit_of_stores_is_taken_from_the_environment(tmp_path):
    code = "from fastbn import _core; print(_core.set_nontemporal_bytes(0))"
    for value, limit in [("", -1), ("0", 0), ("1000", 1000), (str(10**30), sys.maxsize)]:
        done = run_python(code, tmp_path, FASTBN_NONTEMPORAL_BYTES=value)
        assert int(done.stdout) == limit
    for value in ("-1", "8M"):
        done = run_python("import fastbn", tmp_path, FASTBN_NONTEMPORAL_BYTES=value)
        error = done.stderr.strip().splitlines()[-1]
        assert error.startswith("ImportError: FASTBN_NONTEMPORAL_BYTES is")
        assert value in error


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


STATISTICS = np.zeros(16), np.ones(16)
VALID = np.ones((16, 1, 128, 128), bool)


def a_step_of(layer, **options):
    def step(x):
        layer(x, **options)
        layer.backward(x, out=x)

    return step


KERNELS = {
    "stats": lambda x: F.batch_norm_stats(x),
    "elemt": lambda x: F.batch_norm_elemt(x, *STATISTICS, out=x),
    "forward": lambda x: F.batch_norm_forward(x, out=x, mask=VALID),
    "backward_reduce": lambda x: F.batch_norm_backward_reduce(x, x, *STATISTICS),
    "backward_elemt": lambda x: F.batch_norm_backward_elemt(
        x, x, *STATISTICS, None, *STATISTICS, 9, out=x
    ),
    "backward": lambda x: F.batch_norm_backward(x, x, None, *STATISTICS, out=x, mask=VALID),
    "group_forward": lambda x: F.group_norm(x, 4, out=x, mask=VALID),
    "group_backward": a_step_of(fastbn.GroupNorm(4, 16), mask=VALID),
    "try_evaluate": lambda x: F.batch_norm(x, *STATISTICS, out=x),
    "try_train": lambda x: F.batch_norm_forward(x, out=x),
    "try_backward": lambda x: F.batch_norm_backward(x, x, None, *STATISTICS, out=x),
    "try_groups": lambda x: F.group_norm(x, 4, out=x),
    "try_layer_train": lambda x: F.instance_norm(x, out=x),
    "try_layer_frozen": a_step_of(fastbn.BatchNorm2d(16).freeze()),
    "try_layer_backward": a_step_of(fastbn.GroupNorm(4, 16)),
}


@contextmanager
def ticking():
    """The times at which another Python thread got to run, as often as it could."""
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-5)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield ticks
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_other_python_threads_run_during_a_call(monkeypatch, set_num_threads, threads, name):
    set_num_threads(threads)
    x = np.zeros((16, 16, 128, 128), np.float32)
    kernel, windows = getattr(internals.core, name), []

    def timed(*args):
        start = time.perf_counter()
        result = kernel(*args)
        windows.append((start, time.perf_counter()))
        return result

    monkeypatch.setattr(internals.core, name, timed)

    def calls_with_ticks():
        # In the middle half: a thread may lose the GIL just before a kernel that would keep it.
        middles = [((3 * a + b) / 4, (a + 3 * b) / 4) for a, b in windows]
        return sum(any(a < t < b for t in ticks) for a, b in middles)

    # As many calls as it takes: on a busy machine the other thread may be late for most of them.
    with ticking() as ticks:
        while calls_with_ticks() < 6 and len(windows) < 1000:
            for _ in range(20):
                KERNELS[name](x)
            assert windows, f"{name} was not called"
    assert calls_with_ticks() >= 6


def at_once(calls):
    """The results of calls, each made by a thread of its own; all begin at the same time."""
    barrier = threading.Barrier(len(calls))

    def wait_and(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(wait_and, calls))


def train(seed):
    """Some steps of a layer of its own, large enough for concurrent regions of OpenMP.

    Channels of one block, and of many, whose sums wait for each other.
    """
    rng = np.random.default_rng(seed)
    bn = fastbn.BatchNorm2d(8)
    digest = hashlib.sha256()
    for step in range(4):
        x = some(rng, (8, 8, 64, 64) if step < 2 else (2, 8, 260, 260))
        if seed % 2:
            x = support.channels_last(x)
        y = bn(x, out=x if step % 2 else None)
        dx = bn.backward(some(rng, x.shape))
        for array in (y, dx, *bn.state_dict().values(), bn.weight_grad, bn.bias_grad):
            digest.update(array.tobytes())
    return digest.digest()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_python_threads_may_train_layers_of_their_own_at_once(set_num_threads, threads):
    set_num_threads(threads)
    expected = [train(seed) for seed in range(6)]
    assert at_once([functools.partial(train, seed) for seed in range(6)]) == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_python_threads_may_share_a_layer_in_evaluation_mode(rng, set_num_threads, threads):
    set_num_threads(threads)
    bn = fastbn.BatchNorm2d(8)
    inputs = [some(rng, (8, 8, 64, 64)) for _ in range(6)]
    bn(inputs[0])
    bn.eval()
    expected = [bn(x) for x in inputs]
    calls = [lambda x=x: [bn(x) for _ in range(5)] for x in inputs]
    with support.untouched(bn):
        for results, y in zip(at_once(calls), expected, strict=True):
            assert all(same_bits(result, y) for result in results)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="a CPython with the GIL"
)
def test_importing_leaves_the_gil_disabled(tmp_path):
    code = "import fastbn, sys; print(sys._is_gil_enabled())"
    assert output_of(code, tmp_path, PYTHON_GIL=None) == "False\n"


def test_many_python_threads_may_call_at_once(rng):
    x = some(rng, (8, 6, 20, 20))
    expected = fastbn.BatchNorm2d(6)(x)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda _: fastbn.BatchNorm2d(6)(x), range(64))
        assert all(np.array_equal(y, expected) for y in results)


# What a thread does is told by the CPU time that it takes, to which no other process adds.
STARVED = """
import os, subprocess, sys, time
import numpy as np, fastbn

x = np.random.default_rng(0).standard_normal((32, 64, 28, 28), dtype=np.float32)
bn = fastbn.BatchNorm2d(64)

def call(times):
    for _ in range(times):
        bn(x, out=x)

def cpu_seconds(thread):
    with open(f"/proc/self/task/{thread}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9

here, there = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, {here})
fastbn.set_num_threads(1)
call(1)
before = time.thread_time()
call(1000)
alone = time.thread_time() - before
fastbn.set_num_threads(None)
others = set(os.listdir("/proc/self/task"))
call(1)
(thread,) = set(os.listdir("/proc/self/task")) - others
os.sched_setaffinity(int(thread), {there})
os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
code = f"import os; os.sched_setaffinity(0, {{{there}}}); print(flush=True)\\nwhile True: pass"
neighbour = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
try:
    neighbour.stdout.readline()
    call(5)  # the first of them waits
    before = cpu_seconds(thread)
    call(1000)
    print((cpu_seconds(thread) - before) / alone)
finally:
    neighbour.kill()
    neighbour.communicate()
"""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such scheduler here")
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not tell")
@pytest.mark.skipif(internals.threads.granted_cpus()["affinity"] < 2, reason="needs two CPUs")
def test_calls_do_not_wait_again_for_a_thread_whose_cpu_another_process_keeps(tmp_path):
    # Half where all calls wait for the thread's half of the work; a call in 64 may try again.
    assert float(output_of(STARVED, tmp_path, OMP_NUM_THREADS="2")) < 0.2


# fastbn.threads.


def test_a_block_sets_the_number_and_the_outer_one_returns(set_num_threads):
    default = fastbn.get_num_threads()
    set_num_threads(5)
    with fastbn.threads(3):
        assert fastbn.get_num_threads() == 3
        with fastbn.threads(None):
            assert fastbn.get_num_threads() == default
        set_num_threads(6)
        assert fastbn.get_num_threads() == 3
    assert fastbn.get_num_threads() == 6


def test_an_exception_ends_a_block():
    default = fastbn.get_num_threads()
    with pytest.raises(KeyError), fastbn.threads(default + 1):
        raise KeyError
    assert fastbn.get_num_threads() == default


def test_other_python_threads_do_not_notice_a_block():
    default, found = fastbn.get_num_threads(), []

    def look():
        found.append(fastbn.get_num_threads())
        with shared:
            found.append(fastbn.get_num_threads())
        found.append(fastbn.get_num_threads())

    shared = fastbn.threads(default + 1)
    with shared:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert fastbn.get_num_threads() == default + 1
    assert found == [default, default + 1, default]
    assert fastbn.get_num_threads() == default


def test_blocks_may_end_in_another_order():
    default = fastbn.get_num_threads()
    first, second = fastbn.threads(5), fastbn.threads(3)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert fastbn.get_num_threads() == 3
    second.__exit__()
    assert fastbn.get_num_threads() == default


def test_a_block_that_another_thread_leaves_goes_on():
    block, default = fastbn.threads(fastbn.get_num_threads() + 1), fastbn.get_num_threads()
    with block:
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(block.__exit__)
            with pytest.raises(RuntimeError, match="left in the thread that entered it"):
                left.result()
        assert fastbn.get_num_threads() == default + 1
    assert fastbn.get_num_threads() == default


def test_show_config_tells_of_a_block():
    with fastbn.threads(2):
        assert fastbn.show_config("dicts")["threads_reason"] == "fastbn.threads"


@pytest.mark.parametrize(
    ("n", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_block_refuses_what_set_num_threads_refuses(n, error):
    with pytest.raises(error, match="number of threads must be"):
        fastbn.threads(n)


def test_of_a_block_that_is_entered_twice_the_inner_one_is_left_first():
    block = fastbn.threads(2)
    with block, fastbn.threads(3):
        with block:
            pass
        assert fastbn.get_num_threads() == 3
