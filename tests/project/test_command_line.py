"""`python -m fastbn` and its benchmark."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from internals import CORE, bench
from support import same_bits

import fastbn
from fastbn import __main__
from fastbn import functional as F
from fastbn._selfbench import libraries, machine, sampling

LIBRARIES = ["floor", "fastbn", *(["torch"] if importlib.util.find_spec("torch") else [])]
NOT_IN_TORCH = {"eval_inplace", "train_inplace", "backward_inplace"}


def command(*arguments, folder):
    done = subprocess.run(
        [sys.executable, "-m", "fastbn", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    return done.returncode, done.stdout, done.stderr


def test_without_a_command_it_shows_the_configuration(tmp_path, capsys):
    fastbn.show_config()
    assert command(folder=tmp_path) == (0, capsys.readouterr().out, "")


def test_the_configuration_as_json(tmp_path):
    code, output, _ = command("--json", folder=tmp_path)
    assert code == 0
    assert json.loads(output) == fastbn.show_config("dicts")


def test_an_unknown_command_is_refused_with_those_there_are(tmp_path):
    code, _, errors = command("benchmark", folder=tmp_path)
    assert code == 2
    assert "'bench'" in errors


@pytest.mark.parametrize("arguments", [["--seconds", "3"], ["--json", "--seconds", "3"]], ids=str)
def test_seconds_without_the_benchmark_are_refused(tmp_path, arguments):
    code, output, errors = command(*arguments, folder=tmp_path)
    assert (code, output) == (2, "")
    assert "python -m fastbn bench --seconds" in errors


@pytest.fixture
def small(monkeypatch):
    """A benchmark of two small arrays, a round each, without torch, which is slow to start."""
    monkeypatch.setattr(bench, "TORCH", "no_torch")
    monkeypatch.setattr(bench, "SHAPES", ((2, 3, 4, 5), (16, 8, 32, 32)))
    monkeypatch.setattr(bench, "ROUNDS", 1)


@pytest.mark.torch
def test_bench_times_every_operation_and_library(small, capsys, monkeypatch):
    monkeypatch.setattr(bench, "TORCH", "torch")
    __main__.main(["bench", "--json", "--seconds", "0.2"])
    result = json.loads(capsys.readouterr().out)
    assert result["config"] == fastbn.show_config("dicts")
    assert list(result["libraries"]) == LIBRARIES
    cells = {(tuple(row["shape"]), row["operation"]): row for row in result["results"]}
    assert list(cells) == [(s, operation) for s in bench.SHAPES for operation in bench.OPERATIONS]
    for (_, operation), row in cells.items():
        expected = [n for n in LIBRARIES if n != "torch" or operation not in NOT_IN_TORCH]
        assert list(row["ms"]) == expected
        assert all(0 < ms < float("inf") for ms in row["ms"].values())
    assert list(result["over_floor"]) == list(bench.OPERATIONS)
    copy = cells[bench.SHAPES[1], "eval"]["ms"]["floor"]
    assert result["copy_gb_per_s"] == pytest.approx(2 * 16 * 8 * 32 * 32 * 4 / copy / 1e6)


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_bench_prints_a_table_and_its_progress_beside_it(small, capsys, monkeypatch, with_tqdm):
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    __main__.main(["bench", "--seconds", "0.1"])
    table, errors = capsys.readouterr()
    for title in (*bench.OPERATIONS.values(), "2x3x4x5", "16x8x32x32, 0.5 MB", "GB/s"):
        assert title in table
    assert all(line == line.rstrip() and len(line) <= 100 for line in table.splitlines())
    assert "12/12" in errors
    assert "12/12" not in table
    if not with_tqdm:
        assert errors.splitlines()[0] == "1/12 2x3x4x5 eval"


def test_only_quiet_rounds_count_unless_there_are_none():
    def rounds(*answers):
        return bench.figures({"fastbn": [sampling.Round(*answer) for answer in answers]})

    quiet, busy = ([1.0, 2.0, 3.0], 0.1), ([7.0, 8.0], 0.11)
    assert rounds(quiet, busy) == {"ms": {"fastbn": 2.0}, "disturbed": []}
    assert rounds(busy, ([50.0], 0.5)) == {"ms": {"fastbn": 8.0}, "disturbed": ["fastbn"]}
    assert rounds(([], 0.0)) == {"ms": {}, "disturbed": []}


def test_the_means_are_geometric_and_over_the_shapes():
    results = [
        {"operation": "eval", "ms": {"floor": 2.0, "fastbn": 4.0}, "disturbed": []},
        {"operation": "eval", "ms": {"floor": 3.0, "fastbn": 24.0, "torch": 9.0}, "disturbed": []},
        {"operation": "train", "ms": {"floor": 1.0, "fastbn": 7.0}, "disturbed": ["torch"]},
    ]
    means = bench.over_floor(results)
    assert means["eval"] == pytest.approx({"fastbn": 4.0, "torch": 3.0})
    assert means["train"] == pytest.approx({"fastbn": 7.0})
    assert means["backward"] == {}


def test_figures_that_others_disturbed_are_marked_and_not_in_the_means(small, capsys, monkeypatch):
    def time(worker, shape, operation, _):
        disturbed = (worker.name, operation) in [("fastbn", "eval"), ("floor", "backward")]
        disturbed = (disturbed and shape[0] == 2) or operation == "train"
        ms = 1.0 if worker.name == "floor" else 3.0 if shape[0] == 2 else 5.0
        return sampling.Round([ms], float(disturbed))

    monkeypatch.setattr(bench.Worker, "time", time)
    __main__.main(["bench"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["evaluation", "1.000", "3.000", "(3.00)*"] in lines
    assert ["backward", "1.000*", "3.000", "(3.00)"] in lines
    means = [line[-1] for line in lines[-6:]]
    assert means == ["5.00", "3.87", "-", "3.87", "5.00", "3.87"]


@pytest.mark.torch
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_a_process_without_the_others(library):
    with bench.Worker(library, 1) as worker:
        assert worker.time((2, 3, 4, 5), "train", 0.0).ms
        loaded = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert (CORE.replace(".", "/") in loaded) == (library == "fastbn")
    assert ("libtorch" in loaded) == (library == "torch")
    assert worker.process.returncode == 0


def test_a_process_that_fails_is_told_of():
    with pytest.raises(RuntimeError, match="nonsense does not start: KeyError"):
        bench.Worker("nonsense", 1)
    with (
        bench.Worker("floor", 1) as worker,
        pytest.raises(RuntimeError, match="floor has ended"),
    ):
        worker.time((2, 3, -4, 5), "train", 0.0)


BROKEN = {
    "import": (
        "raise ImportError('no\\nlibtorch.so')",
        "torch does not start: ImportError: no libtorch.so",
    ),
    "library": ("raise OSError('libtorch.so is damaged')", "OSError: libtorch.so is damaged"),
    "contents": ("", "AttributeError: module 'torch' has no attribute 'set_num_threads'"),
    "crash": ("import os; os.abort()", "the process of torch has ended"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "words"), BROKEN.values(), ids=BROKEN)
def test_bench_goes_on_without_a_torch_that_cannot_be_imported(
    small, tmp_path, monkeypatch, capfd, code, words
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "TORCH", "torch")
    __main__.main(["bench", "--json", "--seconds", "0.01"])
    output, errors = capfd.readouterr()
    assert list(json.loads(output)["libraries"]) == ["floor", "fastbn"]
    told = [line for line in errors.splitlines() if line.startswith("Measuring without torch: ")]
    assert len(told) == 1
    assert words in told[0]
    assert "Traceback" not in errors


# What is timed is what it says.


@pytest.fixture
def arrays():
    return libraries.arrays_of((4, 3, 6, 5))


def test_the_floor_moves_what_the_operations_move(arrays):
    x, dy, out = (array.copy() for array in arrays)
    floor = libraries.Floor(2)
    for operation, expected in [
        ("eval", (x, dy, x)),
        ("backward", (x, dy, x + dy)),
        ("train_inplace", (-x, dy, x + dy)),
        ("backward_inplace", (-x, -x - dy, x + dy)),
    ]:
        floor.prepare(operation, arrays)(1)
        for array, wanted in zip(arrays, expected, strict=True):
            assert same_bits(array, wanted)
    assert not same_bits(arrays.out, out)


@pytest.fixture
def expected(arrays):
    x, dy, _ = arrays
    y, mean, invstd = F.batch_norm_forward(x)
    return {
        "eval": F.batch_norm(x, np.zeros(3), np.ones(3)),
        "train": y,
        "backward": F.batch_norm_backward(dy, x, None, mean, invstd)[0],
    }


@pytest.mark.parametrize("operation", ["eval", "train", "backward"])
@pytest.mark.parametrize("in_place", [False, True])
def test_fastbn_does_what_it_is_asked_for(
    arrays, expected, set_num_threads, monkeypatch, operation, in_place
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    library = libraries.FastBN(1)
    library.prepare(operation + ("_inplace" if in_place else ""), arrays)(1)
    overwritten = arrays.dy if operation == "backward" else arrays.x
    assert same_bits(overwritten if in_place else arrays.out, expected[operation])


@pytest.fixture
def clock(monkeypatch):
    """Times that only `tick` lets pass: running, and waiting for a CPU."""
    now = {"run": 0.0, "waited": 0.0}

    def tick(run, waited=0.0):
        now["run"] += run
        now["waited"] += waited

    monkeypatch.setattr(sampling.time, "perf_counter", lambda: now["run"])
    monkeypatch.setattr(sampling, "waited_s", lambda: now["waited"])
    return tick


def samples_of(repeat, seconds):
    end = sampling.time.perf_counter() + seconds
    return sampling.Sampler(sampling.wall_clock(repeat)).samples_until(end)


def test_each_sample_is_the_mean_of_as_many_calls_as_a_clock_can_measure(clock):
    asked = []

    def repeat(calls):
        asked.append(calls)
        clock(1e-4 * calls)

    found = samples_of(repeat, 0.1)
    assert found.quiet
    assert found.ms == pytest.approx([0.1] * len(found.ms))
    assert asked[0] == 1
    assert sum(asked) * 1e-4 == pytest.approx(0.1, rel=0.3)
    assert set(asked[-len(found.ms) :]) == {asked[-1]}
    assert asked[-1] * 1e-4 >= sampling.SAMPLE_S


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.01, 16), (0.25, 16), (2.0, 3), (50.0, 1)])
def test_some_calls_or_milliseconds_bring_arrays_back_to_the_caches(clock, milliseconds, calls):
    asked = []

    def repeat(number):
        asked.append(number)
        clock(1e-3 * milliseconds * number)

    sampler = sampling.Sampler(sampling.wall_clock(repeat))
    asked.clear()
    sampler.warm_up()
    assert calls <= sum(asked) < calls + sampler.calls


@pytest.mark.parametrize("always", [False, True])
def test_samples_in_which_threads_waited_count_only_if_all_did(clock, always):
    busy = True

    def repeat(calls):
        nonlocal busy
        busy = always or not busy
        clock(5e-3 if busy else 2e-3, 1e-3 if busy else 0)

    found = samples_of(repeat, 1.0)
    assert found.quiet != always
    assert len(found.ms) > 5
    assert found.ms == pytest.approx([5.0 if always else 2.0] * len(found.ms))


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_waiting_for_a_cpu_is_seen():
    cpus = os.sched_getaffinity(0)
    others = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(0, {min(cpus)})
        os.sched_setaffinity(others.pid, {min(cpus)})
        before, end = machine.waited_s(), time.perf_counter() + 60
        while machine.waited_s() == before and time.perf_counter() < end:
            pass
        assert machine.waited_s() > before
    finally:
        os.sched_setaffinity(0, cpus)
        others.kill()
        others.wait()


@pytest.mark.parametrize("seconds", ["-5", "0", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(capsys, seconds):
    with pytest.raises(SystemExit):
        __main__.parser().parse_args(["bench", "--seconds", seconds])
    assert "--seconds" in capsys.readouterr().err
