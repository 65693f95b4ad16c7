"""The command line as its users call it: real processes, real files."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    MAIN,
    ONE_THREAD,
    PRUNING,
    ROOT,
    TINY_MODEL,
    TINY_RUN,
    TORCHRUN,
    launch,
    needs_gpu,
    run_main,
    write_images,
)
from dynamicvit.errors import exit_status
from dynamicvit.main_dynamic_vit import command
from dynamicvit.models import read_checkpoint
from dynamicvit.runs.clocks import SaveClock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamicvit import utils


def distill(image_folder: Path, dense_run: Path) -> list[str]:
    return [
        *TINY_RUN,
        *PRUNING,
        *("--distill", "--dist_eval", "--pretrained", str(dense_run / "checkpoint_best.pth")),
        *("--data_path", str(image_folder)),
    ]


@pytest.fixture(scope="module")
def dynamic_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dense_run: Path) -> Path:
    output = tmp_path_factory.mktemp("dynamic") / "run"
    result = run_main(*distill(image_folder, dense_run), "--output_dir", output)
    assert result.returncode == 0, result.stderr
    assert "ETA" in result.stdout and "GFLOPs" in result.stdout
    return output


def test_run_leaves_checkpoints_log_and_events(dynamic_run: Path) -> None:
    last = read_checkpoint(dynamic_run / "checkpoint_last.pth")
    assert last["epoch"] == 2 and last["args"]["arch"] == "deit_tiny"
    assert set(last["model"]) == set(last["model_ema"])
    assert last["optimizer"]["state"] and "scale" in last["scaler"]
    best = read_checkpoint(dynamic_run / "checkpoint_best.pth")
    lines = [json.loads(line) for line in (dynamic_run / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(line["val/images"] == 7 for line in lines)
    top1 = [line["val/top1"] for line in lines]
    assert best["history"][-1]["val/top1"] == max(top1)

    events = EventAccumulator(str(dynamic_run)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/cls", "train/ratio", "train/cls_kl", "train/token"} <= scalars
    assert {"train/kept_0", "train/kept_1", "train/kept_2", "train/images_per_second"} <= scalars
    assert {"lr/predictor", "lr/backbone", "val/top1", "val/top5", "val_ema/top1"} <= scalars
    assert [event.step for event in events.Scalars("val/top1")] == [0, 1]
    assert [event.value for event in events.Scalars("val/top1")] == pytest.approx(top1)
    assert {"kept patches", "keep scores"} <= set(events.Tags()["images"])
    assert [image.step for image in events.Images("kept patches")] == [0, 1]
    # 4 strips of 4 panels, 32 pixels each, and gaps of 6: on two columns or one
    assert events.Images("kept patches")[0].width >= 4 * (32 + 6)
    assert events.Tags()["histograms"] == [f"kept share per image/stage {stage}" for stage in range(3)]
    assert 0 <= events.Histograms("kept share per image/stage 2")[0].histogram_value.max <= 1
    gflops = {kind: events.Scalars(f"gflops/{kind}")[0].value for kind in ("dense", "dynamic")}
    assert 0 < gflops["dynamic"] < gflops["dense"]
    # 4 images, 1 process: 5e-4 * 4 / 512 for the predictors; the backbone waits for one epoch
    assert lines[0]["lr/predictor"] == pytest.approx(5e-4 * 4 / 512)
    assert lines[0]["lr/backbone"] == 0 < lines[1]["lr/backbone"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_training_in_two_processes(image_folder: Path, dense_run: Path, tmp_path: Path) -> None:
    """DDP cuts the graph at its buckets, and the attention bias has to get across."""
    options = [*distill(image_folder, dense_run), "--compile", "--output_dir", str(tmp_path), "--no-repeated-aug"]
    result = launch([*TORCHRUN, "--nproc_per_node=2", str(MAIN), *options, "--epochs", "1", "--warmup-epochs", "0"])
    assert result.returncode == 0, result.stderr
    (record,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert record["train/skipped_steps"] == 0 and record["val/images"] == 7


@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("launcher", [[sys.executable], [*TORCHRUN, "--nproc_per_node=1"]], ids=["alone", "torchrun"])
def test_distillation_on_a_gpu(
    launcher: list[str], amp: str, image_folder: Path, dense_run: Path, tmp_path: Path
) -> None:
    options = [*distill(image_folder, dense_run), "--device", "cuda", "--amp", amp, "--output_dir", str(tmp_path)]
    for _ in range(2):  # the second time it resumes, at the end
        result = launch([*launcher, str(MAIN), *options], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    weights = read_checkpoint(tmp_path / "checkpoint_last.pth")["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert weights["score_predictor.0.in_conv.1.bias"].abs().max() > 0  # begins at 0
    skipped = [json.loads(line)["train/skipped_steps"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(skipped) == 2 and sum(skipped) <= (3 if amp == "fp16" else 0)  # the scaler looks for its scale


def test_same_command_same_log_and_weights(
    dynamic_run: Path, image_folder: Path, dense_run: Path, tmp_path: Path
) -> None:
    """To the digit, and however many loader processes there are."""
    result = run_main(*distill(image_folder, dense_run), "--output-dir", tmp_path, "--num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "log.txt").read_text() == (dynamic_run / "log.txt").read_text()
    again, before = (read_checkpoint(run / "checkpoint_last.pth")["model"] for run in (tmp_path, dynamic_run))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_eval_counts_each_image_once_in_two_processes(dynamic_run: Path, image_folder: Path, dense_run: Path) -> None:
    """7 images do not divide by 2, nor into batches of 4."""
    args = [*distill(image_folder, dense_run), "--eval", "--resume", str(dynamic_run / "checkpoint_last.pth")]
    alone = run_main(*args)
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env"]
    together = launch([*launcher, "--standalone", str(MAIN), *args])
    assert alone.returncode == together.returncode == 0, together.stderr
    line = next(line for line in alone.stdout.splitlines() if line.startswith("evaluated"))
    assert "on 7 images" in line
    assert together.stdout.count(line) == 1


@pytest.mark.parametrize(
    "launcher", [["torch.distributed.launch", "--use_env"], ["torch.distributed.run"]], ids=["launch", "torchrun"]
)
def test_trains_in_two_processes(launcher: list[str], image_folder: Path, dense_run: Path, tmp_path: Path) -> None:
    module, *options = launcher
    command = [sys.executable, "-m", module, "--nproc_per_node=2", "--standalone", *options, str(MAIN)]
    result = launch([*command, *distill(image_folder, dense_run), "--output_dir", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0]["lr/predictor"] == pytest.approx(5e-4 * 4 * 2 / 512)
    assert all(line["val/images"] == 7 for line in lines)
    assert result.stdout.count("dense teacher") == 1


def test_lvvit(image_folder: Path, tmp_path: Path) -> None:
    """Alone without a teacher; with one in two processes, whose BatchNorm statistics differ, and two batches a step."""
    sizes = [word if word != "deit_tiny" else "lvvit_s" for word in TINY_RUN]
    dense = run_main(*sizes, "--dense", "--data-path", image_folder, "--output-dir", tmp_path / "dense")
    assert dense.returncode == 0, dense.stderr
    weights = tmp_path / "dense" / "checkpoint_best.pth"
    options = [*sizes, *PRUNING, "--data-path", str(image_folder), "--pretrained", str(weights)]
    result = run_main(*options)
    assert result.returncode == 0, result.stderr
    assert "kept_2" in result.stdout and "cls_kl" not in result.stdout

    options += ["--distill", "--dist-eval", "--update-freq", "2", "--output-dir", str(tmp_path / "dynamic")]
    together = launch([*TORCHRUN, "--nproc_per_node=2", str(MAIN), *options, "--batch-size", "2"])
    assert together.returncode == 0, together.stderr
    lines = [json.loads(line) for line in (tmp_path / "dynamic" / "log.txt").read_text().splitlines()]
    assert len(lines) == 2 and all(line["val/images"] == 7 for line in lines)
    assert lines[0]["lr/predictor"] == pytest.approx(5e-4 * 2 * 2 * 2 / 512)  # images, batches, processes
    assert all(0 < line["train/cls_kl"] < 10 and line["train/skipped_steps"] == 0 for line in lines)


def test_part_of_imagenet_takes_imagenet_labels(tmp_path: Path) -> None:
    """Two WordNet ids, the 1000-way model's own indices; as many classes as folders when asked for."""
    for wnid in ("n01443537", "n15075141"):
        write_images(tmp_path / "train" / wnid, 8)
        write_images(tmp_path / "val" / wnid, 2)
    common = [*TINY_RUN, "--epochs", "1", "--dense", "--data-path", tmp_path]
    assert ", 1000 classes" in run_main(*common).stdout
    assert ", 2 classes" in run_main(*common, "--num-classes", "2").stdout


def test_new_head_for_dense_fine_tuning(image_folder: Path, dense_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_images(tmp_path / "train" / name, 4)
        write_images(tmp_path / "val" / name, 1)
    weights = dense_run / "checkpoint_best.pth"
    result = run_main(*TINY_RUN, "--dense", "--data-path", tmp_path, "--pretrained", weights)
    assert result.returncode == 0, result.stderr
    assert "new head for 3 classes" in result.stdout


@pytest.fixture
def refused(capfd: pytest.CaptureFixture):
    """Asserts one line that says what is wrong and what to do, and an exit status other than 0.

    In this process, as starting one takes seconds; test_error_ends_a_real_process has a real one.
    """

    def check(args: list, *expected: str) -> None:
        assert exit_status(lambda: command([str(arg) for arg in args])) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for text in expected:
            assert text in lines[0], lines[0]

    return check


def test_error_ends_a_real_process() -> None:
    """Said once, by one of two processes."""
    result = launch(
        [*TORCHRUN, "--nproc_per_node=2", str(MAIN), "--arch", "deit_huge", "--data-set", "SHAPES", "--device", "cpu"]
    )
    assert result.returncode != 0
    assert result.stderr.count("error: unknown arch 'deit_huge'") == 1
    assert 'main_dynamic_vit.py", line' not in result.stderr


class TestBadInput:
    def test_data_folder(self, refused, tmp_path: Path) -> None:
        train = [*TINY_RUN, "--dense", "--data-path"]
        refused([*train, tmp_path / "nowhere"], "no data folder", "nowhere", "--data-path")
        refused([*train, tmp_path], "no folder", "val", "layout")
        (tmp_path / "train").mkdir()
        (tmp_path / "val").mkdir()
        refused([*train, tmp_path], "no class folders")
        (tmp_path / "train" / "cats").mkdir()
        (tmp_path / "val" / "cats").mkdir()
        refused([*train, tmp_path], "no images found")

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_unreadable_image_is_named(self, refused, tmp_path: Path, workers: str) -> None:
        write_images(tmp_path / "train" / "cats", 8)
        write_images(tmp_path / "val" / "cats", 2)
        broken = tmp_path / "val" / "cats" / "1.jpg"
        broken.write_bytes(broken.read_bytes()[:300])
        args = [*TINY_RUN, "--dense", "--data-path", tmp_path, "--num-workers", workers]
        if workers == "0":
            refused(args, "cannot read image", str(broken))
            return
        result = run_main(*args)  # not in this process, which would take the loaders apart when it likes
        assert result.returncode == 2 and result.stderr.startswith(f"error: cannot read image {broken}")
        assert result.stderr.count("\n") == 1

    def test_classes_that_do_not_fit_the_weights(self, refused, tmp_path: Path, dense_run: Path) -> None:
        for name in ("a", "b", "c"):
            write_images(tmp_path / "train" / name, 4)
            write_images(tmp_path / "val" / name, 1)
        weights = dense_run / "checkpoint_best.pth"
        args = [*TINY_RUN, *PRUNING, "--distill", "--data-path", tmp_path, "--pretrained", weights]
        refused(args, "2 classes", "3", "--dense")

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (["--arch", "deit_huge"], ["deit_huge", "deit_small", "lvvit_m"]),
            (["--base_rate", "0"], ["--base-rate", "above 0 and at most 1", "got 0"]),
            (["--base-rate", "1.2"], ["--base-rate", "above 0 and at most 1", "got 1.2"]),
            (["--input-size", "30"], ["patch size 8", "30"]),
            (["--pruning-loc", "1", "2", "9"], ["0..3", "9"]),
            (["--batch-size", "64"], ["64", "20", "smaller"]),
            (["--batch-size", "5"], ["even"]),
            (["--epochs", "0"], ["--epochs", "from 1 to", "got 0"]),
        ],
        ids=lambda value: value[0].strip("-") if isinstance(value, list) else None,
    )
    def test_arguments(
        self, refused, args: list[str], expected: list[str], image_folder: Path, dense_run: Path
    ) -> None:
        refused([*distill(image_folder, dense_run), *args], *expected)

    def test_missing_weights(self, refused, image_folder: Path) -> None:
        args = [
            *TINY_MODEL,
            *PRUNING,
            "--arch",
            "deit_base",
            "--data-path",
            image_folder,
            "--distill",
            "--num-classes",
            "2",
            "--device",
            "cpu",
        ]
        refused(args, "sh download_pretrain.sh deit_base", "--pretrained")

    def test_resume_of_no_checkpoint(self, refused, image_folder: Path, dense_run: Path, tmp_path: Path) -> None:
        nonsense = tmp_path / "nonsense.pth"
        nonsense.write_text("not a checkpoint")
        args = distill(image_folder, dense_run)
        refused([*args, "--resume", nonsense], "nonsense.pth", "not a checkpoint")
        refused([*args, "--resume", tmp_path / "none.pth"], "no such file", "none.pth")

    def test_earlier_run_is_left_alone(self, refused, image_folder: Path, dense_run: Path) -> None:
        before = {path: path.read_bytes() for path in dense_run.iterdir()}
        args = [*TINY_RUN, "--dense", "--data-path", image_folder, "--output-dir", dense_run]
        refused([*args, "--lr", "1"], "--lr 0.0005 -> 1.0", "--output-dir")
        refused([*args, "--resume", "none"], "holds an earlier run")
        assert {path: path.read_bytes() for path in dense_run.iterdir()} == before


def test_stopped_run_goes_on_to_the_same_end(
    dynamic_run: Path, image_folder: Path, dense_run: Path, tmp_path: Path
) -> None:
    """SIGTERM in the middle of the first epoch; then the same command again."""
    args = [*distill(image_folder, dense_run), "--output-dir", str(tmp_path), "--print-freq", "1"]
    command = [sys.executable, "-u", str(MAIN), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD, cwd=ROOT.parent) as process:
        for line in process.stdout:
            if line.startswith("epoch 0  step 1/5"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == -signal.SIGTERM and "SIGTERM received: saved at epoch 0" in rest
    stopped = read_checkpoint(tmp_path / "checkpoint_last.pth")
    assert stopped["epoch"] == 0 and 0 < stopped["images"] < 20
    result = run_main(*args)
    assert result.returncode == 0, result.stderr
    assert "resumed at epoch 0, step" in result.stdout
    assert (tmp_path / "log.txt").read_text() == (dynamic_run / "log.txt").read_text()
    weights, expected = (read_checkpoint(run / "checkpoint_last.pth")["model"] for run in (tmp_path, dynamic_run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    launcher = [*TORCHRUN, "--nproc_per_node=2"]
    torch.save(stopped, tmp_path / "stopped.pth")
    result = launch([*launcher, str(MAIN), *args, "--resume", str(tmp_path / "stopped.pth")])
    assert result.returncode == 0, result.stderr
    assert "resumed with 2 process(es) instead of 1" in result.stdout


def test_run_without_its_bad_images(refused, tmp_path: Path) -> None:
    """Counted and listed at the end; and when they are taken away, a resumed run says that the data has changed."""
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cats", "dogs"):
            write_images(tmp_path / part / name, count)
    bad = [tmp_path / "train" / "dogs" / "3.jpg", tmp_path / "val" / "cats" / "0.jpg"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    args = [*TINY_RUN, "--dense", "--data-path", tmp_path, "--output-dir", tmp_path / "run", "--no-repeated-aug"]
    refused(args, "cannot read image")
    result = run_main(*args, "--skip-bad-images", "--num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n".join(["skipped 2 image(s) that cannot be read:", *map(str, bad)]) + "\n")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["val/images"] for line in lines] == [7, 7]

    for path in bad:
        path.unlink()
    result = run_main(*args)
    assert result.returncode == 0, result.stderr
    assert "warning: the training data has changed since the checkpoint (16 images" in result.stdout
    result = run_main(*args, "--eval")
    assert "on 7 images" in result.stdout and "skipped" not in result.stdout


def test_run_that_diverges(refused, image_folder: Path, tmp_path: Path) -> None:
    """Ends with the checkpoint to resume from; its weights are finite, though its answers no longer are."""
    args = [*TINY_RUN, "--dense", "--data-path", image_folder, "--output-dir", tmp_path]
    refused(
        [*args, "--epochs", "8", "--lr", "1e38", "--warmup-epochs", "0"],
        "not finite",
        "checkpoint_last.pth",
        "--clip-grad",
    )
    last = read_checkpoint(tmp_path / "checkpoint_last.pth")
    assert all(value.isfinite().all() for value in last["model"].values())
    assert last["sums"][0]["skipped_steps"][0] > 0


def test_run_in_which_nothing_is_learned(
    refused, dense_run: Path, image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Every loss is not a number: no epoch goes into the log, and nothing is taken for a result."""
    content = read_checkpoint(dense_run / "checkpoint_best.pth")
    content["model"]["head.weight"].fill_(3e38)  # a number, but what it gives is none
    torch.save({"model": content["model"], "spec": content["spec"]}, tmp_path / "damaged.pth")
    damaged = ["--pretrained", tmp_path / "damaged.pth", "--data-path", image_folder]
    run = [*TINY_RUN, *damaged, "--dense", "--output-dir", tmp_path / "run"]
    refused(run, "no step of epoch 0 had a finite loss", "--lr")
    assert not (tmp_path / "run" / "log.txt").read_text()
    refused([*TINY_MODEL, *damaged, "--eval", "--dense", "--device", "cpu"], "answers to 7 of 7 images are not finite")


def test_run_whose_every_step_is_skipped(refused, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses may be finite: it is the gradients that are not."""
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    args = [*TINY_RUN, "--dense", "--data-path", image_folder]
    refused(args, "every step of the run was skipped", "start again")


def test_backbone_that_stays_frozen_is_told(dense_run: Path, image_folder: Path, capfd: pytest.CaptureFixture) -> None:
    args = [*distill(image_folder, dense_run), "--epochs", "1"]
    succeeds([*args, "--warmup-epochs", "1"])
    assert "the backbone is frozen until the end" in capfd.readouterr().out
    succeeds([*args, "--warmup-epochs", "0"])
    assert "frozen" not in capfd.readouterr().out


def test_launcher_starts_a_run_again_that_has_gone_on_from_a_file(
    refused, image_folder: Path, dense_run: Path, tmp_path: Path
) -> None:
    """It goes on where it stopped, not from the file; other arguments are another run."""
    resume = ["--resume", dense_run / "checkpoint_last.pth"]
    args = [*TINY_RUN, "--dense", "--data-path", image_folder, "--output-dir", tmp_path, *resume]
    longer = [*args, "--epochs", "3"]
    assert "resumed at epoch 2, step 0" in run_main(*longer).stdout
    again = run_main(*longer)
    assert again.returncode == 0 and "resumed at epoch 3, step 0" in again.stdout
    refused([*args, "--epochs", "4"], "holds another run")


@pytest.mark.parametrize("frequency", ["-1", "often", "-2m", "m", "1.5", "nanm"])
def test_save_frequency(refused, frequency: str, image_folder: Path) -> None:
    refused([*TINY_RUN, "--dense", "--data-path", image_folder, f"--save-freq={frequency}"], "--save-freq", "15m")


def test_saving_by_the_clock() -> None:
    clock = SaveClock("0.001m")
    assert not clock.is_due(step=1)
    time.sleep(0.07)
    assert clock.is_due(step=1)
    clock.restart()
    assert not clock.is_due(step=1)
    assert [step for step in range(7) if SaveClock("3").is_due(step)] == [0, 3, 6]


def test_resume_of_another_kind_of_run(refused, image_folder: Path, dense_run: Path) -> None:
    refused([*distill(image_folder, dense_run), "--resume", dense_run / "checkpoint_last.pth"], "--pretrained")


BEFORE_SPECS = Path(__file__).parent / "run_before_specs.ckpt"  # an epoch of two, by this program of October 2026


def test_run_from_before_there_were_descriptions(
    image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Its arguments describe the model: it is evaluated and resumed, and no other run is mistaken for it."""
    common = ["--data-path", str(image_folder), *"--device cpu --amp off --num-workers 0".split()]
    assert exit_status(lambda: command([*common, "--eval", "--resume", str(BEFORE_SPECS)])) == 0
    assert "keep 60.0%, 30.0% of the tokens" in capfd.readouterr().out

    dense = [*common, *"--dense --arch deit_tiny --input-size 32 --patch-size 8 --embed-dim 16 --depth 4".split()]
    dense += "--num-heads 2 --epochs 1 --warmup-epochs 0 --batch-size 4".split()
    assert exit_status(lambda: command([*dense, "--output-dir", str(tmp_path / "dense")])) == 0
    shutil.copy(BEFORE_SPECS, tmp_path / "checkpoint_last.pth")
    weights = str(tmp_path / "dense" / "checkpoint_best.pth")
    args = [*common, *"--pruning-loc 1 2 --keep-rates 0.6 0.3 --epochs 2 --warmup-epochs 1 --batch-size 4".split()]
    args += ["--print-freq", "2", "--distill", "--output-dir", str(tmp_path), "--pretrained", weights]
    assert exit_status(lambda: command(args)) == 2
    assert "--pretrained dense/checkpoint_best.pth -> " in capfd.readouterr().err
    resume = ["--resume", str(BEFORE_SPECS), "--output-dir", str(tmp_path / "resumed")]
    assert exit_status(lambda: command([*args, *resume])) == 0
    assert "resumed at epoch 1, step 0" in capfd.readouterr().out
    last = read_checkpoint(tmp_path / "resumed" / "checkpoint_last.pth")
    assert last["epoch"] == 2 and last["spec"]["keep_rates"] == [0.6, 0.3]


def test_evaluation_is_of_the_model_that_was_trained(
    dynamic_run: Path, image_folder: Path, capfd: pytest.CaptureFixture
) -> None:
    """Silently; a flag that says otherwise is obeyed and reported."""
    args = ["--eval", "--resume", str(dynamic_run), "--data-path", str(image_folder), "--device", "cpu"]
    assert exit_status(lambda: command([*args, "--num-workers", "0"])) == 0
    out = capfd.readouterr().out
    assert "predictor + drop before blocks 1, 2, 3 keep 70.0%, 49.0%, 34.3%" in out and "differs" not in out
    assert f"checkpoint: {dynamic_run}/checkpoint_best.pth" in out  # the epoch that the run's summary ended with
    assert exit_status(lambda: command([*args, "--num-workers", "0", "--base-rate", "0.3"])) == 0
    out = capfd.readouterr().out
    assert "keep 30.0%, 9.0%, 2.7%" in out and "differs from the checkpoint: base_rate 0.7 -> 0.3" in out


def test_evaluation_of_an_output_folder(dynamic_run: Path, image_folder: Path, tmp_path: Path, capfd) -> None:
    """The best epoch, though nothing else is left of the run."""
    shutil.copy(dynamic_run / "checkpoint_best.pth", tmp_path)
    args = ["--eval", "--output-dir", str(tmp_path), "--data-path", str(image_folder), "--device", "cpu"]
    succeeds([*args, "--num-workers", "0"])
    assert f"checkpoint: {tmp_path}/checkpoint_best.pth" in capfd.readouterr().out


def test_folders_of_unlabelled_images_name_no_classes(dynamic_run: Path, image_folder: Path, tmp_path: Path) -> None:
    assert read_checkpoint(dynamic_run)["spec"]["class_names"] == ["cats", "dogs"]
    torch.save({"model": read_checkpoint(dynamic_run)["model"]}, tmp_path / "nameless.pth")
    args = [*TINY_RUN, *PRUNING, "--data-path", str(image_folder), "--pretrained", str(tmp_path / "nameless.pth")]
    succeeds([*args, "--epochs", "1", "--cls-weight", "0", "--distill", "--output-dir", str(tmp_path / "run")])
    assert read_checkpoint(tmp_path / "run")["spec"]["class_names"] is None


def test_evaluation_without_a_run(dense_run: Path, image_folder: Path, capfd: pytest.CaptureFixture) -> None:
    """Dense weights, made faster on the spot, beside the dense model."""
    args = "--eval --scorer attention --reducer merge --pruning-loc 1 2 --base-rate 0.8 --device cpu".split()
    args += ["--num-workers", "0", "--pretrained", str(dense_run / "checkpoint_best.pth")]
    assert exit_status(lambda: command([*args, "--data-path", str(image_folder)])) == 0
    out = capfd.readouterr().out
    assert "attention + merge before blocks 1, 2" in out and "agreement with dense" in out and "on 7 images" in out


def succeeds(args: list[str]) -> None:
    assert exit_status(lambda: command(args)) == 0


def test_unlabelled_images(image_folder: Path, dense_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """They train by the published recipe too, mixup and all, and are evaluated by agreement."""
    for part in ("train", "val"):
        write_images(tmp_path / "flat" / part, 9)
    flat = ["--data-path", str(tmp_path / "flat")]
    weights = ["--pretrained", str(dense_run / "checkpoint_best.pth")]
    run = ["--output-dir", str(tmp_path / "run")]
    succeeds([*TINY_RUN, *PRUNING, *flat, *weights, *run, "--distill", "--cls-weight", "0", "--mixup", "0.8"])
    evaluation = ["--eval", "--resume", str(tmp_path / "run"), *flat, "--device", "cpu", "--num-workers", "0"]
    capfd.readouterr()
    succeeds([*evaluation, *weights])
    assert "agreement with dense" in capfd.readouterr().out
    assert exit_status(lambda: command(evaluation)) == 2
    assert "add --pretrained" in capfd.readouterr().err


def test_dynamic_weights_to_start_from(dynamic_run: Path, image_folder: Path, capfd: pytest.CaptureFixture) -> None:
    """They start a dense model and a dynamic one, predictors included; their backbone is the teacher."""
    weights = ["--pretrained", str(dynamic_run / "checkpoint_best.pth"), "--data-path", str(image_folder)]
    succeeds([*TINY_RUN, *PRUNING, *weights, "--epochs", "1", "--distill"])
    out = capfd.readouterr().out
    assert "dense teacher" in out and "untrained" not in out
    succeeds([*TINY_RUN, *weights, "--epochs", "1", "--dense"])


def test_keep_rates_that_are_taken_back(refused, dense_run: Path, image_folder: Path, tmp_path: Path) -> None:
    args = [*distill(image_folder, dense_run), "--output-dir", str(tmp_path)]
    succeeds([*args, "--epochs", "1", "--keep-rates", "0.8", "0.6", "0.5"])
    refused([*args, "--epochs", "1", "--base-rate", "0.7"], "different arguments", "--base-rate 0.7")


def test_embeddings_have_no_labels(refused, dense_run: Path, image_folder: Path, tmp_path: Path) -> None:
    content = read_checkpoint(dense_run / "checkpoint_best.pth")
    weights = {name: value for name, value in content["model"].items() if not name.startswith("head.")}
    torch.save({"model": weights}, tmp_path / "headless.pth")
    args = [*TINY_RUN, *PRUNING, "--pretrained", tmp_path / "headless.pth", "--data-path", image_folder, "--distill"]
    refused(args, "gives embeddings", "--cls-weight 0")
    succeeds([*map(str, args), "--cls-weight", "0", "--epochs", "1"])


class TestLaunching:
    """What the environment says about other processes, where there are none."""

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"RANK": "1"}, "WORLD_SIZE"),
            ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR"),
            ({"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=x"),
        ],
    )
    def test_half_an_environment(
        self, refused, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        refused([*TINY_RUN, "--dense", "--data-set", "SHAPES"], expected, "torchrun")

    def test_missing_processes_are_named(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
        monkeypatch.setattr(utils, "WARN_SECONDS", 1)
        monkeypatch.setattr(utils, "START_SECONDS", 2)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(utils.LaunchError, match="rank 1, 2 of the 3 processes has not started within 2 s"):
            utils.init_distributed(torch.device("cpu"))
        assert "waiting: rank 1, 2 of the 3 processes" in capfd.readouterr().err

    def test_gpu_build_without_a_gpu_says_so(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        utils.warn_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for _ in range(2):
            assert utils.pick_device("auto").type == "cpu"
        message = capsys.readouterr().err
        assert message.count("built for GPUs") == 1 and "choose device cpu: --device cpu in a command" in message
        utils.pick_device("cpu")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.version, "hip", None)
        utils.pick_device("auto")
        assert not capsys.readouterr().err


def test_file_without_a_part_of_its_run(refused, dense_run: Path, image_folder: Path, tmp_path: Path) -> None:
    content = read_checkpoint(dense_run / "checkpoint_last.pth")
    args = [*TINY_RUN, "--dense", "--data-path", image_folder]
    for name, changes in (("sums", {"sums": []}), ("history", {"history": []}), ("scaler", {"scaler": None})):
        broken = {**content, **changes}
        if name == "scaler":
            del broken["scaler"]
        torch.save(broken, tmp_path / "file.pth")
        refused([*args, "--resume", tmp_path / "file.pth"], name, "--pretrained")


def test_old_torch_format_holds_a_run_too(dense_run: Path, image_folder: Path, tmp_path: Path) -> None:
    content = read_checkpoint(dense_run / "checkpoint_last.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    args = [*TINY_RUN, "--dense", "--data-path", str(image_folder), "--epochs", "2"]
    assert exit_status(lambda: command([*args, "--resume", str(tmp_path / "old.pth"), "--no-compile"])) == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--num-classes", "1000000000000"], "--num-classes: must be from 1 to 1,000,000"),
        (["--input-size", "1000000"], "--input-size: must be from 1 to 8,192"),
        (["--num-workers", "1000"], "--num-workers"),
        (["--data-path", ""], "--data-path: must not be empty"),
        (["--epochs", "1", "--warmup-epochs", "2"], "a warm-up of 2 epochs"),
        (["--output-dir", "/sys"], "cannot write to --output-dir /sys"),
    ],
)
def test_wishes_that_cannot_be_met(refused, args: list[str], expected: str, image_folder: Path) -> None:
    refused([*TINY_RUN, "--dense", "--data-path", image_folder, *args], expected)
