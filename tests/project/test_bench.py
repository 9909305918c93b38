"""The repository's benchmark, as far as it is more than what it measures."""

import gc
import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn

ROOT = Path(__file__).parents[2]
IN_PLACE = {"eval_inplace", "train_inplace", "backward_inplace"}
FRESH = {"eval_fresh", "train_fresh", "backward_fresh"}
STEPS_IN_PLACE = {"step_inplace", "step_relu_inplace", "step_leaky_relu_inplace"}
PRODUCTS = {"train_after_256", "train_after_768"}
ACTIVATED = {
    *("eval_relu", "train_relu", "backward_relu"),
    *("eval_relu6", "train_relu6", "backward_relu6"),
    *("eval_leaky_relu", "train_leaky_relu", "backward_leaky_relu"),
    *("eval_add_relu", "train_add_relu", "backward_add_relu"),
}
GROUPED = {"eval_group", "train_group", "backward_group"}
NOT_RELU = {of for of in ACTIVATED if of.endswith(("_relu6", "_leaky_relu"))}
NOT_ACTIVATED = {*IN_PLACE, *FRESH, *PRODUCTS, "eval", "train", "backward"}
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
    case = bench("cases").Case("eval", (2, 3, 4, 5), "float32")
    sampler = worker.sampler_of(prepared, case)
    found = sampler.samples_until(0.0)
    assert sampler.calls == 1
    assert found.ms == [pytest.approx(2.0)]
    assert found.waited == 0.0


def test_a_library_that_cannot_be_imported_is_unavailable(bench):
    with bench("runner").Worker("none", bench("libraries").Setup("none"), 1) as worker:
        assert "ModuleNotFoundError" in worker.about()["unavailable"]


def test_another_process_that_was_asked_last_is_waited_for(bench, monkeypatch):
    runner, libraries = bench("runner"), bench("libraries")
    process = importlib.import_module("_selfbench.process")
    waited_for = []
    monkeypatch.setattr(process, "wait_for_sleep", waited_for.append)
    setup = libraries.Setup("numpy")
    with runner.Worker("numpy", setup, 1) as one, runner.Worker("numpy", setup, 1) as other:
        one.about(), other.about()
        for worker in (one, one, other, other, one):
            worker.request("release", keep_data=False)
        assert waited_for == [one.process.pid, other.process.pid]
        one.process.kill()
        one.process.wait()
        other.request("release", keep_data=False)
        assert waited_for == [one.process.pid, other.process.pid]
    with runner.Worker("numpy", setup, 1) as third:
        third.about()
        third.request("release", keep_data=False)
    assert waited_for == [one.process.pid, other.process.pid]


# The arrays.


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (8, 3, 224, 224)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_arrays_begin_where_numpys_large_ones_do(bench, shape, dtype, layout):
    arrays = bench("arrays")
    values = np.random.default_rng(1).normal(size=shape).astype(dtype)
    array = arrays.in_layout(values, layout)
    assert array.ctypes.data % 4096 == 16
    assert (array.transpose(0, 2, 3, 1) if layout == "nhwc" else array).flags.c_contiguous
    np.testing.assert_array_equal(array, values)


def test_data_are_not_constant_and_fill_the_array(bench):
    cases = bench("cases")
    x = cases.Data(cases.Case("eval", (3, 5, 300, 300), "float32")).x.reshape(-1)
    assert x.size > 1_000_003
    assert x.std() == pytest.approx(1.0, abs=0.01)
    np.testing.assert_array_equal(x[:10], x[1_000_003:1_000_013])


def test_sizes_grow_from_a_kilobyte_to_400_megabytes(bench):
    cases = bench("cases")
    sizes = [cases.Case("eval", of, "float32").bytes for of in cases.growing_shapes()]
    assert sizes == [1024 << k for k in range(19)] + [400 << 20]


# The operations.


@pytest.mark.parametrize(
    ("library", "cannot"),
    [
        ("fastbn", set()),
        (
            "fastbn-unfused",
            NOT_ACTIVATED | NOT_RELU,
        ),
        ("numpy", {"backward_inplace", *ACTIVATED}),
        ("numba", NOT_RELU),
        ("numba-fastmath", NOT_RELU),
        pytest.param("torch", IN_PLACE, marks=pytest.mark.torch),
    ],
)
def test_a_library_is_right_or_says_why_it_cannot(bench, library, cannot):
    runner, cases = bench("runner"), bench("cases")
    setup = bench("libraries").LIBRARIES[library]
    with runner.Worker(library, setup, 1) as worker:
        if "unavailable" in worker.about():
            pytest.skip(f"no {library}")
        failed = set()
        for operation in (*cases.OPERATIONS, *cases.PRODUCTS):
            case = cases.Case(operation, (4, 6, 7, 5), "float32")
            answer = worker.request("prepare", **case._asdict(), variants=None)
            assert all("wrong result" not in reason for reason in answer["failed"].values())
            failed |= {operation} if answer["failed"] else set()
            for variant, about in answer["prepared"].items():
                assert worker.request("time", variant=variant, budget_ms=0.0)["round"]["ms"]
                assert not (about["preallocated"] and case.fresh)
            worker.request("release", keep_data=True)
    assert failed == cannot


@pytest.mark.parametrize(
    ("library", "measured"),
    [
        ("floor", True),
        ("fastbn", True),
        pytest.param("torch", True, marks=pytest.mark.torch),
        ("numpy", False),
        ("fastbn-unfused", False),
    ],
)
@pytest.mark.parametrize("operation", sorted(GROUPED))
def test_a_group_normalization_is_right_or_not_measured(bench, library, measured, operation):
    case = bench("cases").Case(operation, (4, 64, 7, 5), "float32")
    with bench("runner").Worker(library, bench("libraries").LIBRARIES[library], 1) as worker:
        if "unavailable" in worker.about():
            pytest.skip(f"no {library}")
        answer = worker.request("prepare", **case._asdict(), variants=None)
        assert not measured or not answer["failed"]
        assert bool(answer["prepared"]) == measured
        undivided = case._replace(shape=(4, 48, 7, 5))
        answer = worker.request("prepare", **undivided._asdict(), variants=None)
        assert not answer["prepared"]
        assert not measured or "32 groups" in answer["failed"][""]


@pytest.mark.parametrize("operation", ["train_group", "backward_group"])
def test_a_result_of_other_groups_is_wrong(bench, operation):
    cases = bench("cases")
    case = cases.Case(operation, (4, 64, 7, 5), "float32")
    data = cases.Data(case)
    for groups in (32, 16, 64):
        layer = fastbn.GroupNorm(groups, 64)
        layer.weight[...], layer.bias[...] = data.weight, data.bias
        results = {"y": layer(data.x), "dx": layer.backward(data.dy)}
        if not case.forward:
            results = {**results, "dweight": layer.weight_grad, "dbias": layer.bias_grad}
        if groups == 32:
            cases.check(case, data, results)
            continue
        with pytest.raises(ArithmeticError, match="wrong result"):
            cases.check(case, data, results)


def activated(operation, value):
    """A value through an activation, from torch's definitions."""
    if operation.endswith("leaky_relu"):
        return np.where(value > 0, value, 0.01 * value)
    return np.clip(value, 0, 6 if operation.endswith("relu6") else np.inf)


def derivative(operation, value):
    flat = 0.01 if operation.endswith("leaky_relu") else 0.0
    return np.where((value > 0) & ~(operation.endswith("relu6") & (value >= 6)), 1.0, flat)


def results_of(operation, data):
    """The results of an operation on some data, in float64, from torch's definitions."""
    column, axes = (1, -1, 1, 1), (0, 2, 3)
    x, dy, residual, weight, bias = (
        getattr(data, name).astype(np.float64) for name in ("x", "dy", "residual", "weight", "bias")
    )
    weight, bias = weight.reshape(column), bias.reshape(column)
    xhat = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    value = xhat * weight + bias + residual * operation.endswith("_add_relu")
    if operation.startswith("train"):
        return {"y": activated(operation, value)}, value
    g = dy * derivative(operation, value)
    mean, mean_xhat = (v.mean(axes, keepdims=True) for v in (g, g * xhat))
    dx = (g - mean - xhat * mean_xhat) * weight / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    gradients = {"dx": dx, "dweight": (g * xhat).sum(axes), "dbias": g.sum(axes)}
    return gradients | {"dresidual": g}, value


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("other", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("direction", ["train", "backward"])
def test_a_result_with_another_activation_is_wrong(bench, direction, activation, other):
    cases = bench("cases")
    case = cases.Case(f"{direction}_{activation}", (4, 6, 7, 5), "float32")
    data = cases.Data(case)
    data.weight = data.weight * 5  # so that ReLU6 is not ReLU
    arrays, _ = results_of(f"{direction}_{other}", data)
    if activation == other:
        cases.check(case, data, arrays)
        return
    with pytest.raises(ArithmeticError, match="wrong result"):
        cases.check(case, data, arrays)


@pytest.mark.parametrize("operation", sorted(STEPS_IN_PLACE))
def test_a_step_in_place_is_right_in_every_call(bench, operation):
    runner, cases = bench("runner"), bench("cases")
    case = cases.Case(operation, (4, 6, 7, 5), "float32")
    data = cases.Data(case)
    prepared = bench("libraries.fastbn").Library(1).prepare(case, "nchw", data)
    for _ in range(2):
        prepared.restore()
        cases.check(case, data, prepared.result(prepared.call()))
    own = runner.Runner(runner.Settings(1, 1.0, 1, [], ["nchw"]), [])
    for library in ("floor", "fastbn", "torch"):
        assert own._is_asked(SimpleNamespace(name=library), case) == (library == "fastbn")


@pytest.mark.parametrize(
    "operation", ["train_relu", "train_add_relu", "backward_relu", "backward_add_relu"]
)
def test_a_result_without_the_relu_or_the_addition_is_wrong(bench, operation):
    cases = bench("cases")
    case = cases.Case(operation, (4, 6, 7, 5), "float32")
    data = cases.Data(case)
    arrays, value = results_of(operation, data)
    cases.check(case, data, arrays)
    other = operation.replace("add_relu", "relu")
    if other == operation:
        other = operation.replace("relu", "add_relu")
    wrong = [results_of(other, data)[0]]
    if case.forward:
        wrong.append({"y": value})
    elif case.has_residual:
        wrong.append({**arrays, "dresidual": data.dy})
    for each in wrong:
        with pytest.raises(ArithmeticError, match="wrong result"):
            cases.check(case, data, each)


@pytest.mark.parametrize(("near", "right"), [(5e-4, True), (5e-3, False)])
def test_rounding_may_decide_the_derivative_where_the_value_is_near_0(bench, near, right):
    cases = bench("cases")
    case = cases.Case("backward_add_relu", (4, 1, 8, 8), "float32")
    data = cases.Data(case)
    _, value = results_of(case.operation, data)
    residual = np.array(data.residual)
    residual.flat[7] += near - value.flat[7]
    data.residual = residual
    arrays, _ = results_of(case.operation, data)
    arrays["dresidual"].flat[7] = 0.0
    if right:
        cases.check(case, data, arrays)
    else:
        with pytest.raises(ArithmeticError, match="dresidual"):
            cases.check(case, data, arrays)


STEPS = ["step", "step_masked", "step_ghosts", "step_instance", "step_group"]
STEPS += ["step_relu", "step_add_relu"]


def results_of_step(bench, case, data, of):
    """What fastbn gives on the CPU for a case, or for another that its results are held against."""
    cases = bench("cases")
    channels, options = case.shape[1], {}
    if of == "step_instance":
        layer = fastbn.InstanceNorm2d(channels, affine=True)
    elif of == "step_group":
        layer = fastbn.GroupNorm(cases.GROUPS, channels)
    else:
        ghosts = cases.GHOST_BATCH if of == "step_ghosts" else None
        activation = "relu" if of.endswith("relu") else None
        layer = fastbn.BatchNorm2d(channels, ghost_batch_size=ghosts, activation=activation)
    layer.weight[...], layer.bias[...] = data.weight, data.bias
    if of == "step_masked":
        options["mask"] = data.mask
    if of == "step_add_relu":
        options["residual"] = data.residual
    y = layer(data.x, **options)
    dx = layer.backward(data.dy)
    dx = dx[0] if of == "step_add_relu" else dx
    return {"y": y, "dx": dx, "dweight": layer.weight_grad, "dbias": layer.bias_grad}


@pytest.mark.parametrize("other", STEPS)
@pytest.mark.parametrize("operation", STEPS)
def test_a_step_is_right_where_it_is_the_one_that_was_asked_for(bench, operation, other):
    cases = bench("cases")
    case = cases.Case(operation, (16, 64, 5, 4), "float32")
    data = cases.Data(case)
    results = results_of_step(bench, case, data, other)
    if operation == other:
        cases.check(case, data, results)
        return
    with pytest.raises(ArithmeticError, match="wrong result"):
        cases.check(case, data, results)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("operation", STEPS)
def test_a_step_on_a_gpu_is_right_in_every_call(bench, operation, layout):
    importlib.import_module("gpu")  # a simulated one, or CuPy's
    cases = bench("cases")
    case = cases.Case(operation, (16, 64, 5, 4), "float32")
    data = cases.Data(case)
    call = bench("libraries.fastbn_cuda").step(case, layout, data)
    for _ in range(2):
        results = [array.get() for array in call()]
        cases.check(case, data, dict(zip(("y", "dx", "dweight", "dbias"), results, strict=True)))


def test_steps_are_for_a_gpu(bench, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        bench("__main__").main(["--steps"])
    assert "--device cuda" in capsys.readouterr().err


def test_a_matrix_product_comes_right_before_every_call(bench, monkeypatch):
    worker, library, cases = bench("worker"), bench("library"), bench("cases")
    order = []
    monkeypatch.setattr(worker.np, "matmul", lambda a, b: order.append(a.shape))
    case = cases.Case("train_after_256", (2, 3, 4, 5), "float32")
    prepared = library.PreparedCall(lambda: order.append("call"), dict, True)
    sampler = worker.sampler_of(prepared, case)
    sampler.samples_until(0.0)
    assert sampler.calls == 1
    assert order[::2] == [(256, 256)] * (len(order) // 2)
    assert order[1::2] == ["call"] * (len(order) // 2)


def test_a_result_is_there_until_the_next_call_has_returned(bench):
    bench("cases")  # which makes _selfbench importable
    results = []

    class Result:
        def __init__(self):
            self.before = results[-1]() if results else None
            results.append(weakref.ref(self))

    alive = []

    def call():
        alive.append(results[-1]() is not None if results else None)
        result = Result()
        result.before = None
        return result

    repeat = importlib.import_module("_selfbench.sampling").repeated(call)
    repeat(2)
    repeat(1)
    assert alive == [None, True, True]
    assert [each() is not None for each in results] == [False, False, True]


def test_the_floor_reaches_every_element(bench):
    runner, libraries, cases = bench("runner"), bench("libraries"), bench("cases")
    with runner.Worker("floor", libraries.LIBRARIES["floor"], 2) as worker:
        if "unavailable" in (about := worker.about()):
            pytest.skip(about["unavailable"])
        for shape in (1, 1, 1, 1), (1, 1, 1, 3), (2, 23, 17, 17), (64, 64, 9, 9):
            for operation in "eval", "train_inplace", "backward", "backward_add_relu":
                case = cases.Case(operation, shape, "float32")
                answer = worker.request("prepare", **case._asdict(), variants=None)
                assert answer["failed"] == {}
                assert len(answer["prepared"]) >= 2


@pytest.mark.parametrize("threads", [1, 2])
def test_the_floor_tells_how_long_a_cache_line_takes_to_another_cpu_and_back(bench, threads):
    runner, libraries = bench("runner"), bench("libraries")
    cpus = len(bench("machine").available_cpus())
    with runner.Worker("floor", libraries.LIBRARIES["floor"], threads) as worker:
        if "unavailable" in (about := worker.about()):
            pytest.skip(about["unavailable"])
        assert (worker.request("round_trip")["ns"] > 0) == (min(threads, cpus) > 1)


# The run.


def chosen(bench, *arguments):
    """The operations, libraries and the name that arguments of the command line choose."""
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    main = bench("__main__")
    options = main.parser().parse_args(arguments)
    operations = dict.fromkeys(case.operation for case in main.cases_of(options))
    return set(operations), set(main.libraries_of(options)), main.kind_of(options)


def test_activations_are_measured_where_they_are_asked_for(bench):
    operations, libraries, name = chosen(bench)
    assert not operations & ACTIVATED
    assert "fastbn-unfused" not in libraries
    assert name == "full"
    operations, libraries, name = chosen(bench, "--activations")
    assert operations == {"eval", "train", "backward", *ACTIVATED, *STEPS_IN_PLACE}
    assert {"floor", "fastbn", "fastbn-unfused", "torch", "torch-compile"} < libraries
    assert name == "activations"
    main = bench("__main__")
    for shapes, some in (([], True), (["--shapes", "gate"], False)):
        cases = main.cases_of(main.parser().parse_args(["--activations", *shapes]))
        of = {name: {case.shape for case in cases if case.operation == name} for name in operations}
        assert of["train_leaky_relu"] == of["step_inplace"]
        assert (of["train_leaky_relu"] < of["train_relu"] == of["train"]) == some
    operations, libraries, _ = chosen(bench, "--operations", "train_relu")
    assert operations == {"train_relu"}
    assert "fastbn-unfused" in libraries


def test_group_normalizations_are_measured_where_they_are_asked_for(bench):
    operations, libraries, name = chosen(bench)
    assert not operations & GROUPED
    operations, libraries, name = chosen(bench, "--groups")
    assert operations == GROUPED
    assert libraries == {"floor", "fastbn", "torch", "torch-malloc", "torch-compile"}
    assert name == "groups"
    assert chosen(bench, "--operations", "train_group")[0] == {"train_group"}


@pytest.mark.parametrize("operation", ["train", "train_relu"])
def test_fastbn_with_numpys_passes_is_asked_about_activations_alone(bench, operation):
    runner, case = bench("runner"), bench("cases").Case(operation, (1, 2, 3, 4), "float32")

    class Worker:
        name = "fastbn-unfused"

    own = runner.Runner(runner.Settings(1, 1.0, 1, [Worker.name], ["nchw"]), [Worker()])
    assert own._is_asked(Worker(), case) == case.activated


class AskedWorker:
    """Notes what it is asked, and by whose name, and gives an answer to what it is to do."""

    def __init__(self, name, asked, answer):
        self.name, self.asked, self.answer = name, asked, answer

    def request(self, do, **message):
        self.asked.append((do, self.name, message.get("operation")))
        return self.answer(do)


def test_a_round_goes_through_all_cases_before_the_next(bench):
    runner, cases = bench("runner"), bench("cases")
    asked = []

    def answer(do):
        if do == "prepare":
            about = {"preallocated": True, "note": ""}
            return {"prepared": {"nchw": about}, "failed": {"nhwc": "no"}}
        ms = 9.0 if len(asked) < 10 else 1.0
        return {"round": {"ms": [ms], "waited": 0.0}, "calls": 1}

    settings = runner.Settings(3, 1.0, 1, ["numpy", "numba"], ["nchw"])
    workers = [AskedWorker(name, asked, answer) for name in settings.libraries]
    own = runner.Runner(settings, workers)
    both = [cases.Case(operation, (1, 2, 3, 4), "float32") for operation in ("eval", "train")]
    own.measure(both, lambda case: None)
    prepared = [operation for do, name, operation in asked if do == "prepare" and name == "numpy"]
    assert prepared == ["eval", "train"] * 3
    timed = [name for do, name, _ in asked if do == "time"]
    two_turns = ["numpy", "numba", "numba", "numpy"]
    assert timed == two_turns * (runner.TURNS // 2 * len(both) * 3)
    results = own.results()
    assert [(of["operation"], of["library"]) for of in results] == [
        (operation, name) for operation in ("eval", "train") for name in ("numpy", "numba")
    ]
    assert all(of["samples"] == 3 * runner.TURNS for of in results)
    assert all(of["median_ms"] == 1.0 for of in results)
    assert [note["shapes"] for note in own.notes()] == [["1x2x3x4"]] * 4


def test_the_floor_is_asked_for_a_round_trip_before_every_case(bench):
    runner, cases = bench("runner"), bench("cases")
    asked = []

    def answer(do):
        return {"ns": 98.76} if do == "round_trip" else {"prepared": {}, "failed": {}}

    both = [cases.Case(operation, (1, 2, 3, 4), "float32") for operation in ("eval", "train")]
    for threads, wanted in (2, [98.8] * 4), (1, []):
        settings = runner.Settings(2, 1.0, threads, ["numpy", "floor"], ["nchw"])
        workers = [AskedWorker(name, asked, answer) for name in settings.libraries]
        own = runner.Runner(settings, workers)
        own.measure(both, lambda case: None)
        assert own.round_trips_ns == wanted
    assert ("round_trip", "numpy") not in [request[:2] for request in asked]


@pytest.mark.parametrize(
    ("round_trips", "text"),
    [
        ([], ""),
        ([99.0, 101.0], "A cache line went from one CPU to another one and back in 99 ns."),
        (
            [99.0, 440.0, 430.0, 420.0],
            "A cache line went from one CPU to another one and back in 99 ns, and in 430 ns before "
            "3 of 4 rounds of a case, whose CPUs were far from each other.",
        ),
    ],
)
def test_the_report_tells_how_far_the_cpus_were_from_each_other(bench, round_trips, text):
    pytest.importorskip("matplotlib")
    assert bench("report")._distance(round_trips) == text


def test_what_the_machine_says_of_itself_is_in_the_result(bench):
    machine = bench("machine").describe()
    assert machine["virtual"] in (True, False)
    assert all(name.startswith("L") for name in machine["caches"])


# The goals.


def figures_of(bench, times, shape=(32, 64, 56, 56), dtype="float32"):
    """Figures from milliseconds by operation, library and variant."""
    results = [
        {
            "threads": 2,
            "operation": operation,
            "shape": shape,
            "dtype": dtype,
            "library": library,
            "variant": variant,
            "preallocated": True,
            "median_ms": ms,
            "min_ms": ms,
        }
        for (operation, library, variant), ms in times.items()
    ]
    return bench("figures").Figures({"settings": {}, "results": results})


def limits_of(bench, figures):
    """The limits that verdicts have, by goal."""
    return {each.goal: each.limit for each in bench("goals").verdicts(figures, 2)}


@pytest.mark.parametrize(
    ("shape", "stream_ms", "limit"),
    [
        ((32, 64, 56, 56), 3.0, {"float32 train_inplace / copy, ordinary": 0.85}),
        ((32, 64, 56, 56), 1.0, {"float32 train_inplace / copy, streaming": 1.1}),
        ((32, 512, 7, 7), 1.0, {"float32 train_inplace / copy, 7x7": 2.0}),
        ((1, 64, 56, 56), 1.0, {}),
    ],
)
def test_what_training_in_place_may_take_depends_on_the_copy(bench, shape, stream_ms, limit):
    times = {
        ("train_inplace", "floor", "copy_plain/2"): 2.0,
        ("train_inplace", "floor", "copy_stream/2"): stream_ms,
        ("train_inplace", "fastbn", "nchw"): 2.0,
    }
    assert limits_of(bench, figures_of(bench, times, shape)) == limit


@pytest.mark.parametrize(
    ("operation", "layout", "large", "small"),
    [
        ("eval", "nchw", 1.0, 1.05),
        ("train", "nchw", 0.95, 1.05),
        ("train_inplace", "nchw", 0.9, 1.05),
        ("backward", "nchw", 0.85, 1.05),
        ("train", "nhwc", 1.0, 1.05),
    ],
)
def test_how_far_ahead_of_the_peers_depends_on_the_size(bench, operation, layout, large, small):
    times = {(operation, "fastbn", layout): 1.0, (operation, "numba", "nchw"): 1.0}
    words = "channels-last " if layout == "nhwc" else ""
    name = f"float32 {words}{operation} / fastest peer"
    at_8_mib = limits_of(bench, figures_of(bench, times, (2, 64, 128, 128)))
    above = limits_of(bench, figures_of(bench, times, (2, 64, 128, 129)))
    assert at_8_mib == {f"{name}, up to 8 MiB": small}
    assert above == {f"{name}, above 8 MiB": large}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_may_be_further_from_a_copy_of_their_bytes(bench, dtype):
    times = {("train", "floor", "copy_plain/2"): 1.0, ("train", "fastbn", "nchw"): 1.0}
    figures = figures_of(bench, times, dtype=dtype)
    assert limits_of(bench, figures) == {f"{dtype} train / copy": 1.55}


RELU_GOAL = "float32 with / without an activation"
FUSED_GOALS = {
    "addition and ReLU fused / unfused": 1 / 1.6,
    "addition and ReLU fused / torch eager NCHW": 1 / 2.5,
}


@pytest.mark.parametrize(
    ("operation", "floor", "limits"),
    [
        ("eval_relu", "copy", {RELU_GOAL: 1.05}),
        ("train_relu", "copy", {RELU_GOAL: 1.05}),
        ("backward_relu", "add", {RELU_GOAL: 1.05}),
        ("train_relu6", "copy", {RELU_GOAL: 1.05}),
        ("backward_leaky_relu", "add", {RELU_GOAL: 1.05}),
        ("eval_add_relu", "add", {"float32 eval_add_relu / add": 1.25, **FUSED_GOALS}),
        ("train_add_relu", "add", {"float32 train_add_relu / add": 1.4, **FUSED_GOALS}),
        ("backward_add_relu", "pair", {"float32 backward_add_relu / pair": 1.4, **FUSED_GOALS}),
    ],
)
def test_what_a_relu_and_an_addition_may_take_from_1_mib_on(bench, operation, floor, limits):
    plain = operation.split("_")[0]
    times = {
        (plain, "fastbn", "nchw"): 2.0,
        (operation, "fastbn", "nchw"): 3.0,
        (operation, "fastbn-unfused", "nchw"): 6.0,
        (operation, "torch", "nchw"): 9.0,
        (operation, "floor", f"{floor}_plain/2"): 1.5,
    }
    assert limits_of(bench, figures_of(bench, times, (256, 16, 8, 8))) == limits
    assert limits_of(bench, figures_of(bench, times, (255, 16, 8, 8))) == {}
    found = bench("goals").verdicts(figures_of(bench, times), 2)
    values = {of.goal: of.value for of in found if of.goal in limits}
    ratios = dict(zip([RELU_GOAL, *FUSED_GOALS], (1.5, 0.5, 1 / 3), strict=True))
    assert values == {goal: pytest.approx(ratios.get(goal, 2.0)) for goal in limits}


@pytest.mark.parametrize(("activation", "limit"), [("relu", 1.54), ("leaky_relu", 1.05)])
def test_a_step_in_place_is_held_against_one_without_an_activation(bench, activation, limit):
    operation = f"step_{activation}_inplace"
    times = {("step_inplace", "fastbn", "nchw"): 2.0, (operation, "fastbn", "nchw"): 3.0}
    figures = figures_of(bench, times)
    assert limits_of(bench, figures) == {f"float32 {operation} / without": limit}
    assert bench("goals").verdicts(figures, 2)[0].value == 1.5


def test_the_table_of_activations_holds_fastbn_against_all_others(bench):
    pytest.importorskip("matplotlib")
    times = {
        ("train", "fastbn", "nchw"): 2.0,
        ("train_relu", "floor", "copy_plain/2"): 1.5,
        ("train_relu", "fastbn", "nchw"): 3.0,
        ("train_relu", "fastbn-unfused", "nchw"): 6.0,
        ("train_relu", "torch", "nhwc"): 9.0,
    }
    report, figures = bench("report"), figures_of(bench, times)
    text = report._activations(figures, 2, "float32")
    assert (
        "| fastbn / floor | fastbn / without | fastbn-unfused / fastbn | torch / fastbn |" in text
    )
    assert "| training forward + ReLU | 2 | 1.5 | 2 | 3 |" in text
    row = report._section(figures, 2, "float32", "train_relu", "nchw")
    assert "| fastbn / copy | fastbn / without | fastbn / unfused |" in row
    assert "| 3 | 2 | 1.5 | 0.5 | torch nhwc | 9 | 0.333 | miss: without |" in row
    plain = figures_of(bench, {("train", "fastbn", "nchw"): 2.0})
    assert report._activations(plain, 2, "float32") == ""


def test_the_table_of_group_normalizations_holds_fastbn_against_all_others(bench):
    pytest.importorskip("matplotlib")
    times = {
        ("train_group", "floor", "copy_plain/2"): 1.5,
        ("train_group", "fastbn", "nchw"): 3.0,
        ("train_group", "torch", "nchw"): 9.0,
        ("train_group", "torch", "nhwc"): 6.0,
    }
    report, figures = bench("report"), figures_of(bench, times)
    text = report._groups(figures, 2, "float32")
    assert "| fastbn / floor | torch / fastbn |" in text
    assert "| training forward of a GroupNorm of 32 groups | 2 | 2 |" in text
    row = report._section(figures, 2, "float32", "train_group", "nchw")
    assert "| 3 | 2 | torch nhwc | 6 | 0.5 |  |" in row
    plain = figures_of(bench, {("train", "fastbn", "nchw"): 2.0})
    assert report._groups(plain, 2, "float32") == ""


def test_a_new_array_and_a_matrix_product_are_held_against_the_call_by_itself(bench):
    goals = bench("goals")
    times = {
        ("train", "fastbn", "nchw"): 2.0,
        ("train", "fastbn-1-thread", "nchw"): 1.6,
        ("train_fresh", "fastbn", "nchw"): 3.0,
        ("train_after_256", "fastbn", "nchw"): 4.0,
    }
    found = {of.goal: of.value for of in goals.verdicts(figures_of(bench, times), 2)}
    assert found["new array / out=, above 20 MiB"] == 1.5
    assert found["train after a matrix product / before"] == 2.5


def test_every_miss_is_listed_and_counted(bench):
    pytest.importorskip("matplotlib")
    times = {
        ("eval", "floor", "copy_plain/2"): 1.0,
        ("eval", "fastbn", "nchw"): 1.2,
        ("eval", "numba", "nchw"): 1.5,
    }
    costs = [
        {"library": "fastbn", "call": "L", "operation": "eval", "times_add": 9.0},
        {"library": "torch", "call": "T", "operation": "eval", "times_add": 18.0},
    ]
    text = bench("report")._goals({"calls": costs}, figures_of(bench, times))
    assert "2 of 3 figures miss their limits; one in 10 may." in text
    assert text.index("| L / np.add | eval | 9.00 | 3 |") < text.index(
        "| float32 eval / copy | 32x64x56x56 | 1.20 | 1.1 |"
    )


def test_the_table_beside_openblas_has_every_library(bench):
    pytest.importorskip("matplotlib")
    times = {
        ("train", "fastbn", "nchw"): 2.0,
        ("train_after_256", "fastbn", "nchw"): 3.0,
        ("train_after_256", "numba", "nchw"): 4.0,
    }
    text = bench("report")._products(figures_of(bench, times), 2)
    assert "| fastbn | 2 | 3 (1.5) |" in text
    assert "| numba | - | 4 (-) |" in text
    assert bench("report")._products(figures_of(bench, {("train", "fastbn", "nchw"): 2.0}), 2) == ""


def test_speed_is_what_is_read_and_written_at_least(bench):
    pytest.importorskip("matplotlib")
    picture, figures = bench("picture"), bench("figures")
    case = bench("cases").Case
    time = figures.Time(1.0, "fastbn", "nchw", True)
    arrays_of = {"eval": 2, "train_relu": 2, "eval_add_relu": 3, "backward_relu": 3}
    for operation, arrays in {**arrays_of, "backward": 3, "backward_add_relu": 4}.items():
        key = figures.Key(2, case(operation, (1, 1, 500, 500), "float32"))
        assert picture._speed(key, time) == arrays * 1e6 / 1e6


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
    for call in statements:
        assert call.startswith("F.") or operations[call] == set(bench("goals").CALL_LIMITS)
    assert operations.keys() == {calls.ADD, *statements}


def test_the_report_says_of_every_call_whether_it_is_within_its_limit(bench):
    pytest.importorskip("matplotlib")
    report, calls = bench("report"), bench("calls")
    costs = [
        {"library": "fastbn", "call": calls.ADD, "operation": "", "ns": 500.0, "times_add": 1.0},
        {"library": "fastbn", "call": "L", "operation": "eval", "ns": 1500.0, "times_add": 3.0},
        {"library": "fastbn", "call": "L", "operation": "train", "ns": 2550.0, "times_add": 5.1},
        {"library": "fastbn", "call": "L with relu", "operation": "eval", "times_add": 3.9},
        {"library": "torch", "call": "T", "operation": "eval", "ns": 9000.0, "times_add": 18.0},
    ]
    result = {"calls": costs, "machine": {"cpu": "CPU"}, "date": "2026-01-01", "commit": "c"}
    lines = report._call_costs(result).splitlines()
    assert "| evaluation forward | ≤ 3 | 3.0 hit | 3.9 hit | 18.0 |" in lines
    assert "| training forward | ≤ 5 | 5.1 **miss** | - | - |" in lines
    assert "| backward | ≤ 5 | - | - | - |" in lines
    assert report._call_costs({"results": []}) == ""
