import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICES, needs_gpu, write_images
from dynamicvit.errors import exit_status
from dynamicvit.models import ARCHS, ModelSpec, build_model, create_model
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.patches import PatchProjection
from dynamicvit.models.stages import FOR_SPEED
from dynamicvit.tools import benchmark, contenders
from torch._dynamo.testing import CompileCounter

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "deit_tiny", "--input-size", "32", "--batch-size", "2", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share a busy machine's cores wait for each other at every small operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_archs(monkeypatch: pytest.MonkeyPatch):
    """Shrinks the architectures for the benchmark, which builds them in full."""
    for name in ("deit_tiny", "lvvit_s"):
        sizes = ARCHS[name].sizes | {"embed_dim": 32, "num_heads": 2, "depth": 4}
        small = replace(ARCHS[name], sizes=sizes, pruning_loc=(1, 2, 3))
        monkeypatch.setitem(ARCHS, name, small)


def settings(**changes: object) -> contenders.Settings:
    plain = contenders.Settings("deit_tiny", 0.7, None, None, 32, (2,), "off", "cpu", None, False, False, 1)
    return replace(plain, **changes)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    set_by_import = ("KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL")  # of tools, above
    environment = {name: value for name, value in os.environ.items() if name not in set_by_import}
    command = [sys.executable, "-m", "tools.benchmark", *TINY, *arguments]
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_inference_report(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result = run_command("--base-rate", "0.5", "--batch-size", "1", "2", "--markdown", "--json", str(file))
    report = json.loads(file.read_text())
    assert report["hardware"] in result.stdout
    names = ["dense", "dynamic", "merged", "bound", "ToMe"]
    assert [(row["batch_size"], row["model"]) for row in report["rows"]] == [(b, n) for b in (1, 2) for n in names]
    assert result.stdout.count("\n| ") == 2 + 10, "a table for docs"
    dense, dynamic, merged, bound, tome = report["rows"][5:]
    assert merged["gflops"] == pytest.approx(dynamic["gflops"], rel=0.1)
    assert tome["gflops"] == pytest.approx(dynamic["gflops"], rel=0.3)  # of 4 tokens
    assert 0.9 * merged["gflops"] < bound["gflops"] < merged["gflops"], "choosing tokens costs something"
    assert dense["gflops"] == pytest.approx(count_gflops(create_model("deit_tiny", img_size=32, dense=True), 32))
    assert dynamic["gflops"] == pytest.approx(count_gflops(create_model("deit_tiny", 0.5, img_size=32), 32))
    assert dynamic["gflops_ratio"] == pytest.approx(dense["gflops"] / dynamic["gflops"])
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in report["rows"])
    assert all((row["peak_mib"] is None) == (row["batch_size"] == 1) for row in report["rows"])
    assert "profil" not in result.stderr


def test_row_is_made_of_the_seconds_measured() -> None:
    seconds = {"dense": np.array([1.0, 2.0, 4.0]), "dynamic": np.array([1.0, 0.5, 1.0])}
    dense, dynamic = (benchmark.summarize(seconds, name, batch_size=2) for name in seconds)
    assert (dense["images_per_s"], dynamic["images_per_s"]) == (1, 2)
    assert dense["spread"] == pytest.approx(1.5 / 2)
    assert (dense["ratio"], dynamic["ratio"]) == (1, 4)
    assert dynamic["p50_ms"] == pytest.approx(1000) and dense["p95_ms"] == pytest.approx(3800)


@pytest.mark.usefixtures("small_archs")
@pytest.mark.parametrize("place", ["before", "inside"])
def test_the_bound_has_the_same_stages_and_looks_at_nothing(place: str) -> None:
    models = contenders.make_models(settings(place=place, input_size=64), 64, 0.5)
    merged, bound = models["merged"].eval(), models["bound"].eval()
    assert merged.spec.scorer == FOR_SPEED.scorer and merged.place == bound.place == place
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        merged, bound = merged.trace(images), bound.trace(images)
    assert [kept.shape for kept in bound.kept] == [kept.shape for kept in merged.kept]
    assert all(kept.tolist() == [list(range(kept.shape[1]))] * 2 for kept in bound.kept)


def test_merged_has_at_most_as_many_stages_as_asked_for() -> None:
    published = ModelSpec("deit_tiny", 0.6, img_size=32)
    dense = build_model(published.as_dense())
    few, all_of_them = (
        contenders.merged_spec(published, dense, 0.6 * count_gflops(dense, 32), None, n) for n in (3, 12)
    )
    assert (len(few.pruning_loc), len(all_of_them.pruning_loc)) == (3, 8)
    assert few.keep_rates[0] < all_of_them.keep_rates[0]


@pytest.mark.usefixtures("small_archs")
def test_dense_with_patches_by_product_is_a_row_where_it_is_another_kernel() -> None:
    on_gpu = settings(device="cuda", amp="bf16")  # built on the CPU
    models = contenders.make_models(on_gpu, 32, 0.7)
    assert list(models)[:3] == ["dense", "dense, patches by product", "dynamic"]
    assert type(models["dense"].patch_embed.proj) is torch.nn.Conv2d
    assert type(models["dense, patches by product"].patch_embed.proj) is PatchProjection
    for other in (replace(on_gpu, amp="off"), replace(on_gpu, device="cpu"), replace(on_gpu, train=True)):
        assert "dense, patches by product" not in contenders.make_models(other, 32, 0.7)


@needs_gpu
@pytest.mark.usefixtures("small_archs")
def test_recorded_steps_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    flags = [*TINY[:-1], "cuda", "--graph", "--amp", "bf16", "--json", str(file)]
    benchmark.command(flags)
    assert json.loads(file.read_text())["rows"][0]["model"] == "dense"


@needs_gpu
def test_a_recording_computes_the_batch_that_it_is_given() -> None:
    seen = torch.zeros(2, device="cuda")
    step = contenders.recorded(lambda x, _: seen.copy_(2 * x), torch.zeros(2, device="cuda"), seen)
    step(torch.tensor([1.0, 2.0], device="cuda"), seen)
    assert seen.tolist() == [2, 4]


@pytest.mark.parametrize("flags", [[], ["--train"]])
@pytest.mark.usefixtures("small_archs")
def test_models_compared_have_the_same_weights(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []

    def prepare(contender, images, labels, compile_mode) -> dict:
        weights.extend({n: t.clone() for n, t in module.state_dict().items()} for module in contender.modules)
        return {"gflops": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr(benchmark, "prepare", prepare)
    list(benchmark.measure(settings(train=bool(flags)), 32, 0.7))
    dense, *others = weights
    assert len(others) == (6 if flags else 4)  # a teacher's names begin with vit.
    for other in others:
        other = {name.removeprefix("vit."): tensor for name, tensor in other.items()}
        assert all(torch.equal(other[name], tensor) for name, tensor in dense.items())


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_of_a_step(device: str) -> None:
    model = torch.nn.Linear(1000, 1000, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        model(images).exp().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    images = torch.ones(2000, 1000, device=device)
    step(images, images)
    contender = contenders.Contender(step, [model], optimizer)
    assert contenders.bytes_held(contender) == 8e6  # weights and momentum
    allocated = contenders.peak_allocated(lambda: step(images, images), on_gpu=device == "cuda")
    # the product and its exponential, then the gradients in their place; a GPU's cuBLAS needs some more
    assert allocated == pytest.approx(16e6, rel=0.01) if device == "cpu" else 16e6 <= allocated < 100e6


def test_input_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "train" / "cats", 3)
    benchmark.command(["--input", str(tmp_path), "--input-size=32", "--repeats=2", "--json", str(tmp_path / "x.json")])
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["images"] == 3 and report["median_pixels"] == 40 * 36 and report["images_per_s_and_core"] > 0
    assert "images_per_s_and_core" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
@pytest.mark.usefixtures("small_archs")
def test_training_report(arch: str, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    benchmark.command([*TINY, "--arch", arch, "--train", "--amp", "bf16", "--repeats", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    dense, alone, dynamic, distilled, merged = rows
    assert [row["model"] for row in rows] == list(contenders.TRAININGS)
    assert alone["gflops"] == pytest.approx(dense["gflops"] / 3, rel=0.15)  # forward alone
    assert merged["gflops"] < distilled["gflops"]  # tokens leave in training, too
    # no token leaves in training, and the teacher adds one forward pass of the dense model
    assert dynamic["gflops"] == pytest.approx(dense["gflops"], rel=0.1)
    teacher = count_gflops(create_model(arch, img_size=32, dense=True), 32)
    assert distilled["gflops"] - dynamic["gflops"] == pytest.approx(teacher)
    # weights in float32, two moments, and at least the gradients
    parameters = sum(p.numel() for p in create_model(arch, img_size=32, dense=True).parameters())
    assert dense["peak_mib"] > 16 * parameters / 2**20
    assert distilled["peak_mib"] > dynamic["peak_mib"] > dense["peak_mib"]


@pytest.mark.usefixtures("small_archs")
def test_scaling_covers_sizes_and_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "SCALING_SIZES", (32, 64))
    monkeypatch.setattr(benchmark, "SCALING_RATES", (1.0, 0.3))
    file = tmp_path / "speed.json"
    benchmark.command([*TINY, "--scaling", "--repeats", "1", "--json", str(file)])
    dynamic = [row for row in json.loads(file.read_text())["rows"] if row["model"] == "dynamic"]
    assert [(row["input_size"], row["base_rate"]) for row in dynamic] == [(32, 0.7), (64, 0.7), (32, 1.0), (32, 0.3)]
    assert benchmark.points(settings(train=True), scaling=True) == [(32, 0.7), (64, 0.7)]


@pytest.mark.usefixtures("small_archs")
def test_scaling_compiles_any_number_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compile_(self, fullgraph=True, backend="eager"))
    monkeypatch.setattr(benchmark, "SCALING_SIZES", ())
    monkeypatch.setattr(benchmark, "SCALING_RATES", (1.0, 0.7))
    with torch._dynamo.config.patch(recompile_limit=4):  # enough for one rate: two models, two batches
        benchmark.command([*TINY, "--scaling", "--compile", "--repeats", "1"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input-size", "33"], "patch size 16 does not divide input size 33"),
        (["--base-rate", "1.5"], "above 0 and at most 1"),
        (["--scaling", "--keep-rates", "0.5", "0.4", "0.3"], "cannot go with --keep-rates"),
        (["--input", "nowhere"], "no such folder: nowhere"),
        (["--input", "tests", "--train"], "leave out --train"),
        (["--json", "nowhere/speed.json"], "cannot write nowhere/speed.json"),
        (["--json", "/proc/speed.json"], "cannot write /proc/speed.json"),
        (["--graph"], "--graph records inference on a GPU"),
    ],
)
def test_user_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_status(lambda: benchmark.command([*TINY, *args])) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_one_graph_and_compiled_once(arch: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()  # other tests have compiled the same function, and there is a limit for all
    model = create_model(arch, img_size=64, embed_dim=16, num_heads=2, depth=4, pruning_loc=[1, 2, 3], num_classes=5)
    model.eval().to(dtype)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            images = torch.randn(2, 3, 64, 64, dtype=dtype)
            expected = model(images)  # first, as it decides the attention kernel: torch 2.7 would compile it again
            torch.testing.assert_close(compiled(images), expected)
    assert counter.frame_count == 1
