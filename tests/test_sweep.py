import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pictures import ROOT, cli, random_image, tiny_model

from flops import count_gflops
from models import geometric_keep_rates
from tools import sweep

METHODS = ["learned", "random", "class attention"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint beside 2 classes of 5 validation images; it names no data folder."""
    root = tmp_path_factory.mktemp("data")
    pixels = random_image(40, 90).permute(1, 2, 0).numpy()
    for shift in range(10):
        folder = root / "val" / ("cats", "dogs")[shift % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:, 5 * shift : 5 * shift + 40]).save(folder / f"{shift}.png")
    model, args = tiny_model(amp="off")
    torch.save({"model": model.state_dict(), "args": vars(args)}, root / "tiny.pth")
    return root / "tiny.pth"


def test_sweep(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.sweep", "--resume", str(checkpoint), "--data-path", str(checkpoint.parent)]
    command += "--base-rates 1.0 0.7 0.4 --batch-size 4 --num-workers 0 --device cpu".split()
    command += ["--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["base_rate"]) for row in rows] == [
        (m, r) for r in ("1.0", "0.7", "0.4") for m in METHODS
    ]
    for method in METHODS:
        gflops = [float(row["gflops"]) for row in rows if row["method"] == method]
        assert gflops[0] > gflops[1] > gflops[2]
    assert len({row["top1"] for row in rows if row["base_rate"] == "1.0"}) == 1
    assert all(float(row["images_per_s"]) > 0 for row in rows)

    model, _ = tiny_model()
    model.set_keep_rates(geometric_keep_rates(0.7, 3))
    assert float(rows[3]["gflops"]) == pytest.approx(count_gflops(model, 32))
    assert Image.open(tmp_path / "out" / "sweep.png").size == (1500, 630)


def test_accuracy_counts_every_image_once() -> None:
    """10 images in batches of 4; the model's own predictions as labels, but for 3 of them."""
    model, _ = tiny_model(num_classes=5)
    images = torch.stack([random_image(32, 32).roll(shift, dims=2) for shift in range(10)])
    device = torch.device("cpu")
    model.set_keep_rates(geometric_keep_rates(0.6, 3))
    with torch.no_grad():
        labels = model(sweep.BatchTransform(device)(images)).argmax(dim=1)
    labels[[0, 4, 9]] = (labels[[0, 4, 9]] + 1) % 5
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    (row,) = sweep.evaluate_at(0.6, {"learned": model}, loader, device, None, 32)
    assert row["top1"] == 70


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_class_attention_is_the_attention_of_the_block_before(arch: str) -> None:
    model, _ = tiny_model(arch)
    variants = sweep.make_variants(model, trained=True)
    assert list(variants) == METHODS
    attentive = variants["class attention"]
    attention, scores = [], []
    for block in attentive.blocks:
        block.attn.fused_attn = False  # the plain kernel shows its weights to the dropout
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: attention.append(inputs[0]))
    for scorer in attentive.score_predictor:
        scorer.register_forward_hook(lambda _, __, output: scores.append(output))
    with torch.no_grad():
        _, kept = attentive.forward_pruned(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert len(scores) == 3
    for stage, score in enumerate(scores):
        expected = attention[stage][:, :, 0, 1:].mean(dim=1)  # stages 0, 1, 2 come after blocks 0, 1, 2
        torch.testing.assert_close(score[..., 0], expected)
    assert torch.equal(kept[0], attention[0][:, :, 0, 1:].mean(dim=1).topk(9).indices)
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks), "the learned scores' model stays as it was"


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_methods_differ_in_the_tokens_kept_only(arch: str) -> None:
    variants = sweep.make_variants(tiny_model(arch, num_classes=5)[0], trained=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, kept = {}, {}
    with torch.no_grad():
        for name, model in variants.items():
            kept[name] = model.forward_pruned(images)[1][0].sort().values.tolist()
            model.set_keep_rates([1.0] * 3)
            logits[name] = model(images)
    for name in METHODS[1:]:
        assert kept[name] != kept["learned"]
        torch.testing.assert_close(logits[name], logits["learned"])


def test_no_class_attention_before_the_first_block_and_no_learned_scores_without_training() -> None:
    model, _ = tiny_model(pruning_loc=[0, 2])
    assert list(sweep.make_variants(model, trained=False)) == ["untrained", "random"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data-path", "nowhere"], "no data folder nowhere"),
        (["--base-rates", "0.5", "0"], "--base-rates: keep rates must lie in (0, 1]"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--device", "toaster"], "unknown --device toaster"),
    ],
)
def test_user_errors_are_one_line(
    args: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli("tools.sweep", "--resume", checkpoint, *args) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_missing_matplotlib_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli("tools.sweep", "--resume", "missing.pth") == 2
    assert capsys.readouterr().err == "error: the plot needs matplotlib; get it: pip install -r requirements-dev.txt\n"
