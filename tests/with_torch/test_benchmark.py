"""The benchmark of whole training steps, on small ones."""

import json

import pytest

pytestmark = pytest.mark.torch

pytest.importorskip("torch")
pytest.importorskip("tqdm")
benchmark = pytest.importorskip("bench.torch", reason="not in the repository's root")

SMALL = ["--models", "mobilenet_v2", "--modes", "eager", "fastbn", "--threads", "1"]


@pytest.mark.filterwarnings("ignore")
def test_modes_take_the_same_steps(tmp_path, capsys):
    small = [*SMALL, "--batch", "4", "--size", "64", "--out", str(tmp_path)]
    benchmark.main([*small, "--steps", "1", "--kinds", "float32"])
    result = json.loads((tmp_path / "torch.json").read_text())
    (case,) = result["results"]
    assert case["fused"] == 35
    assert case["loss"]["fastbn"] == pytest.approx(case["loss"]["eager"], rel=1e-3)
    assert all(parts["batch norm"] > 0 for parts in case["parts"].values())
    table = (tmp_path / "torch.md").read_text()
    assert table in capsys.readouterr().out
    (tmp_path / "torch.md").unlink()
    benchmark.main(["report", str(tmp_path / "torch.json")])
    assert (tmp_path / "torch.md").read_text() == table


@pytest.mark.filterwarnings("ignore")
def test_pieces_are_added_to_what_is_there_and_a_stopped_run_loses_nothing(tmp_path, monkeypatch):
    small = [*SMALL, "--batch", "2", "--size", "32", "--no-parts", "--out", str(tmp_path)]
    benchmark.main([*small, "--steps", "1", "--kinds", "float32-last"])

    def stopped(result, path):
        save(result, path)
        raise KeyboardInterrupt

    save = benchmark.save
    monkeypatch.setattr(benchmark, "save", stopped)
    for kind in "float32", "float32-last":
        with pytest.raises(KeyboardInterrupt):
            benchmark.main([*small, "--steps", "9", "--kinds", kind])
    result = json.loads((tmp_path / "torch.json").read_text())
    assert [case["kind"] for case in result["results"]] == ["float32", "float32-last"]
    counts = [{len(times) for times in case["ms"].values()} for case in result["results"]]
    assert counts == [{1}, {2}]
    assert "medians of 1 to 2 steps" in benchmark.tables(result)
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.main([*small, "--steps", "1", "--kinds", "float32", "--batch", "3"])
    assert json.loads((tmp_path / "torch.json").read_text()) == result


def test_the_table_of_steps_goes_between_marks(tmp_path, capsys):
    case = {"model": "resnet50", "kind": "float32", "ms": {"eager": [4.0, 2.0], "fastbn": [1.5]}}
    result = {
        "machine": {"cpu": "a CPU"},
        "versions": {"torch": "2"},
        "settings": {"batch": 8, "size": 224, "threads": 2},
        "results": [case | {"parts": {}}],
    }
    (tmp_path / "torch.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench-torch -->\nold\n<!-- /bench-torch -->\nafter\n")
    benchmark.main(["report", str(tmp_path / "torch.json"), "--readme", str(page)])
    text = page.read_text()
    assert "| resnet50 | float32 | 3 | 2 | 0.50 | 0.88 |" in text
    assert text.startswith("before\n<!-- bench-torch -->\n\na CPU, 2 threads")
    assert text.endswith("\n\n<!-- /bench-torch -->\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize(("name", "fused"), [("resnet50", 49), ("mobilenet_v2", 35)])
def test_the_models_are_the_ones_that_are_known(name, fused):
    model = benchmark.accelerate(benchmark.MODELS[name]())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx({"resnet50": 25.557, "mobilenet_v2": 3.505}[name], abs=1e-3)
    assert len(benchmark.report(model).fused) == fused
