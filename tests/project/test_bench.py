"""The repository's benchmark, as far as it is more than what it measures."""

import gc
import importlib
import weakref
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The suite may be taken from the repository, to test an installed package.
pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="no benchmark here")


@pytest.fixture
def bench(monkeypatch):
    """What imports modules of the benchmark."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
@pytest.mark.parametrize("library", ["fastbn", "numpy"])
def test_a_library_is_timed_in_a_process_without_the_others(bench, library):
    runner, libraries = bench("runner"), bench("libraries")
    case = bench("cases").Case("train", (2, 3, 4, 5), "float32")
    with runner.Worker(library, libraries.Setup(library), 1) as worker:
        assert "versions" in worker.about()
        prepared = worker.request("prepare", **case._asdict(), variants=["nchw"])
        assert prepared["failed"] == {}
        answer = worker.request("time", variant="nchw", budget_ms=1.0)
        loaded = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert all(0 < ms < float("inf") for ms in answer["round"]["ms"])
    assert ("fastbn/_core" in loaded) == (library == "fastbn")


def test_what_tells_a_result_is_kept_as_it_may_own_the_memory_that_a_call_writes_to(bench):
    library, worker = bench("library"), bench("worker")
    owners = []

    class Owner:
        def __call__(self, _):
            return {}  # of which nothing is checked

    class Library(library.Library):
        api = buffers = ""

        def versions(self):
            return {}

        def prepare(self, case, variant, data):
            owner = Owner()
            owners.append(weakref.ref(owner))
            return library.PreparedCall(int, owner, True)

    served = worker.Worker(Library(1))
    served.prepare("eval", [2, 3, 4, 5], "float32", None)
    gc.collect()
    assert owners[0]() is not None
    assert served.time("nchw", 0.0)["round"]["ms"]
    served.release(False)
    assert owners[0]() is None


def test_a_device_has_a_clock_of_its_own_and_the_hosts_waiting_does_not_count(bench):
    library, worker = bench("library"), bench("worker")
    prepared = library.PreparedCall(int, dict, True, sample_ns=lambda: 2e6)
    sampler = worker.sampler_of(prepared)
    found = sampler.samples_until(0.0)
    assert sampler.calls == 1
    assert found.ms == [pytest.approx(2.0)]
    assert found.waited == 0.0


def test_a_library_that_cannot_be_imported_is_unavailable(bench):
    with bench("runner").Worker("none", bench("libraries").Setup("none"), 1) as worker:
        assert "ModuleNotFoundError" in worker.about()["unavailable"]


# The cost of a call.


def test_a_backward_costs_what_it_adds_to_a_forward(bench):
    calls = bench("calls")
    times = calls.with_backwards(
        {
            ("layer", "train"): calls.Timed(2.0, True),
            ("layer", "step"): calls.Timed(5.0, True),
            ("functions", "train"): calls.Timed(1.0, False),
            ("functions", "step"): calls.Timed(5.0, True),
        }
    )
    assert times["layer", "backward"] == (3.0, True)
    assert times["functions", "backward"] == (4.0, False)
    assert ("layer", "step") not in times


def test_a_cost_is_the_median_of_the_quiet_rounds_multiples(bench):
    calls = bench("calls")

    def multiple(*rounds):
        add, own = (calls.ADD, ""), ("layer", "eval")
        times = [{add: calls.Timed(*of_add), own: calls.Timed(*of)} for of_add, of in rounds]
        cost = calls.cost(own, times)
        return cost["times_add"], cost["rounds"]

    slow, fast = ((2.0, True), (6.0, True)), ((1.0, True), (5.0, True))
    busy, busy_add = ((1.0, True), (90.0, False)), ((9.0, False), (9.0, True))
    assert multiple(slow, fast, busy, busy_add) == (4.0, 2)
    assert multiple(busy, busy, busy_add) == (90.0, 3)


def test_every_statement_is_one_that_works(bench, monkeypatch, set_num_threads):
    calls = bench("calls")
    monkeypatch.setattr(calls, "ROUNDS", 1)
    monkeypatch.setattr(calls, "SAMPLE_S", 0.0)
    statements = bench("libraries.fastbn").Library(1).calls()
    costs = calls.costs(statements)["costs"]
    operations = {of["call"]: set() for of in costs}
    for cost in costs:
        operations[cost["call"]].add(cost["operation"])
    assert operations["BatchNorm2d"] == set(bench("goals").CALL_LIMITS)
    assert operations.keys() == {calls.ADD, *statements}


def test_the_report_says_of_every_call_whether_it_is_within_its_limit(bench):
    pytest.importorskip("matplotlib")
    report, calls = bench("report"), bench("calls")
    costs = [
        {"library": "fastbn", "call": calls.ADD, "operation": "", "ns": 500.0, "times_add": 1.0},
        {"library": "fastbn", "call": "L", "operation": "eval", "ns": 1500.0, "times_add": 3.0},
        {"library": "fastbn", "call": "L", "operation": "train", "ns": 2550.0, "times_add": 5.1},
        {"library": "torch", "call": "T", "operation": "eval", "ns": 9000.0, "times_add": 18.0},
    ]
    result = {"calls": costs, "machine": {"cpu": "CPU"}, "date": "2026-01-01", "commit": "c"}
    lines = report._call_costs(result).splitlines()
    assert "| evaluation forward | ≤ 3 | 3.0 hit | 18.0 |" in lines
    assert "| training forward | ≤ 5 | 5.1 **miss** | - |" in lines
    assert "| backward | ≤ 5 | - | - |" in lines
    assert report._call_costs({"results": []}) == ""
