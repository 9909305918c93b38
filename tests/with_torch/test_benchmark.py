"""The benchmark of whole training steps, on small ones."""

import json

import pytest

pytestmark = pytest.mark.torch

pytest.importorskip("torch")
pytest.importorskip("tqdm")
benchmark = pytest.importorskip("bench.torch", reason="not in the repository's root")

SMALL = ["--models", "mobilenet_v2", "--modes", "eager", "fastbn", "--batch", "4", "--size", "64"]


@pytest.mark.filterwarnings("ignore")
def test_modes_take_the_same_steps(tmp_path, capsys):
    benchmark.main([*SMALL, "--steps", "1", "--kinds", "float32", "--out", str(tmp_path)])
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


@pytest.mark.parametrize(("name", "fused"), [("resnet50", 49), ("mobilenet_v2", 35)])
def test_the_models_are_the_ones_that_are_known(name, fused):
    model = benchmark.accelerate(benchmark.MODELS[name]())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx({"resnet50": 25.557, "mobilenet_v2": 3.505}[name], abs=1e-3)
    assert len(benchmark.report(model).fused) == fused
