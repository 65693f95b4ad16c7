import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from flops import count_gflops
from models import create_model
from tools import benchmark

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "deit_tiny", "--img-size", "32", "--batch-size", "2", "--repeats", "2", "--device", "cpu"]


def run_benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.benchmark", *TINY, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_inference_report(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result = run_benchmark("--base-rate", "0.5", "--json", str(file))
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert report["hardware"] in result.stdout
    dense, dynamic = report["rows"]
    assert (dense["model"], dynamic["model"]) == ("dense", "dynamic")
    assert dynamic["ratio"] == pytest.approx(dynamic["images_per_s"] / dense["images_per_s"])
    assert dense["gflops"] == pytest.approx(count_gflops(create_model("deit_tiny", img_size=32, dense=True), 32))
    assert dynamic["gflops"] == pytest.approx(count_gflops(create_model("deit_tiny", 0.5, img_size=32), 32))
    assert dynamic["gflops_ratio"] == pytest.approx(dense["gflops"] / dynamic["gflops"])
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in report["rows"])


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_training_report(arch: str, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    benchmark.main([*TINY, "--arch", arch, "--train", "--amp", "bf16", "--repeats", "1", "--json", str(file)])
    dense, dynamic, distilled = json.loads(file.read_text())["rows"]
    assert [dense["model"], dynamic["model"], distilled["model"]] == ["dense", "dynamic", "dynamic + teacher"]
    # no token leaves in training; the teacher adds a forward pass of the dense model, a third of its step
    assert dynamic["gflops"] == pytest.approx(dense["gflops"], rel=0.1)
    assert distilled["gflops"] - dynamic["gflops"] == pytest.approx(dense["gflops"] / 3, rel=0.02)
    assert distilled["ratio"] == pytest.approx(distilled["images_per_s"] / dense["images_per_s"])


def test_scaling_covers_sizes_and_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "SCALING_SIZES", (32, 64))
    monkeypatch.setattr(benchmark, "SCALING_RATES", (1.0, 0.3))
    file = tmp_path / "speed.json"
    benchmark.main([*TINY, "--scaling", "--repeats", "1", "--json", str(file)])
    dynamic = [row for row in json.loads(file.read_text())["rows"] if row["model"] == "dynamic"]
    assert [(row["img_size"], row["base_rate"]) for row in dynamic] == [(32, 0.7), (64, 0.7), (32, 1.0), (32, 0.3)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--img-size", "33"], "patch size 16 does not divide input size 33"),
        (["--base-rate", "1.5"], "keep rates must lie in (0, 1]"),
        (["--scaling", "--keep-rates", "0.5", "0.4", "0.3"], "cannot go with --keep-rates"),
        (["--json", "nowhere/speed.json"], "no such directory: nowhere"),
    ],
)
def test_user_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([*TINY, *args])
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_evaluation_is_one_graph_and_compiled_once(arch: str) -> None:
    model = create_model(arch, img_size=64, embed_dim=16, num_heads=2, depth=4, pruning_loc=[1, 2, 3], num_classes=5)
    model.eval()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            images = torch.randn(2, 3, 64, 64)
            torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 1
