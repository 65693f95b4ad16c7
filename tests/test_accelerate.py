"""tools.accelerate: what it leaves, what it never trains on, resuming, and what users do wrong."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ONE_THREAD, ROOT, TORCHRUN, launch, write_images
from dynamicvit.datasets import AugmentedDataset, classes_fit
from dynamicvit.errors import exit_status
from dynamicvit.recipe import RECIPES
from dynamicvit.tools import accelerate, speedup
from safetensors.torch import load_file

from dynamicvit import engine, models

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TWO_CLASSES = models.ModelSpec(num_classes=2)
QUICK = "--flops-speedup 1.3 --num-workers 0 --device cpu --batch-size 8".split()


def save_weights(path: Path, num_classes: int) -> Path:
    torch.manual_seed(0)
    model = models.create_model("deit_tiny", dense=True, num_classes=num_classes, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():  # far from 0, so that answers differ
            if parameter.ndim > 1:
                parameter.mul_(8)
    torch.save({"model": model.state_dict(), "spec": model.spec.to_dict()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "dense.pth", num_classes=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cats", "dogs"):
        write_images(folder / name, 30)
    return folder


@pytest.fixture(autouse=True, scope="module")
def short():
    """Two epochs, and no measuring of speeds for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedup, "SECONDS", 0)
        patch.setattr(speedup, "MIN_ROUNDS", 1)
        patch.setitem(RECIPES["label-free"], "epochs", 2)
        yield


@pytest.fixture(autouse=True)
def handlers_stay():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(weights: Path, photos: Path, output: Path, *more: str, model: str = "deit_tiny") -> int:
    words = [model, "--weights", weights, "--images", photos, "--output", output, *QUICK, *more]
    return exit_status(lambda: accelerate.command([str(word) for word in words]))


def saved_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def best_weights(output: Path) -> dict[str, torch.Tensor]:
    return models.read_checkpoint(output / "training" / "checkpoint_last.pth")["model"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_whole_command_on_labelled_images(weights: Path, photos: Path, tmp_path: Path) -> None:
    words = ["deit_tiny", "--weights", weights, "--images", photos, "--output", tmp_path / "fast", *QUICK]
    command = [sys.executable, "-m", "tools.accelerate", *map(str, words), "--steps", "2"]
    result = launch(command, ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert "ETA" in result.stdout
    report = json.loads((tmp_path / "fast" / "report.json").read_text())
    assert list(report["rows"]) == ["dense", "merged", "fine-tuned"]
    dense, merged, tuned = report["rows"].values()
    assert dense["agreement"] == 100 and dense["kl"] == 0
    assert all(row["images"] == report["images_held_back"] and "top1" in row for row in report["rows"].values())
    assert dense["gflops"] / merged["gflops"] == pytest.approx(1.3, abs=0.1)  # tokens are whole
    assert tuned["gflops"] == merged["gflops"]
    assert all(row[f"images_per_s_{size}"] > 0 for row in report["rows"].values() for size in (1, 32))
    assert report["saved"] == min(("merged", "fine-tuned"), key=lambda name: report["rows"][name]["kl"])
    page = (tmp_path / "fast" / "report.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)=['\"](?!data:)", page)
    model = models.from_pretrained(tmp_path / "fast")
    assert model.reducer == "merge" and model.spec.class_names == ("cats", "dogs")


def test_flat_folder_needs_no_labels(weights: Path, photos: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        shutil.copy(path, flat / f"{path.parent.name}_{path.name}")
    assert run(weights, flat, tmp_path / "fast", "--steps", "2") == 0
    rows = json.loads((tmp_path / "fast" / "report.json").read_text())["rows"]
    assert "top1" not in rows["fine-tuned"] and "kl" in rows["fine-tuned"]


def test_embeddings_are_compared_by_cosine(photos: Path, tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "headless.pth", num_classes=0)
    assert run(weights, photos, tmp_path / "fast", "--steps", "2") == 0
    rows = json.loads((tmp_path / "fast" / "report.json").read_text())["rows"]
    assert rows["dense"]["cosine"] == pytest.approx(1) and rows["dense"]["neighbour"] == 100
    assert 0 < rows["merged"]["cosine"] < 1 and "kl" not in rows["merged"]


def test_neighbours_by_hand() -> None:
    dense = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    moved = torch.tensor([[1.0, 0.0], [0.3, 1.0], [0.0, 1.0]])  # the second is now nearest to the third
    assert accelerate_report.same_neighbour(dense, dense) == 1
    assert accelerate_report.same_neighbour(moved, dense) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arch", "num_classes", "expected"),
    [
        ("vit_small_patch14_dinov2", 0, True),
        ("vit_base_patch16_clip_224.openai", 512, True),  # its projection
        ("vit_base_patch16_clip_224.openai", 10, False),  # a user's classifier on top of it
        ("vit_base_patch16_clip_224.openai_ft_in1k", 1000, False),
        ("deit_small", 1000, False),
    ],
)
def test_which_models_give_embeddings(arch: str, num_classes: int, expected: bool) -> None:
    assert models.gives_embeddings(models.ModelSpec(arch, num_classes=num_classes)) == expected


def test_no_minutes_no_training(weights: Path, photos: Path, tmp_path: Path) -> None:
    assert run(weights, photos, tmp_path / "fast", "--minutes", "0") == 0
    assert not (tmp_path / "fast" / "training").exists()
    dense = models.find_weights(models.read_checkpoint(weights))
    assert_equal(saved_weights(tmp_path / "fast"), dense)


def test_minutes_become_steps() -> None:
    """5 minutes less 10 times 3 measurings of 2 s, at 0.5 s a step: 480 steps."""
    tuning = SimpleNamespace(recipe=SimpleNamespace(epochs=10), seconds_a_step=lambda: 0.5)
    assert accelerate.FineTuning.schedule(tuning, steps=None, minutes=5, seconds=2.0) == (10, 48)


def test_held_back_images_are_never_trained_on(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[str]] = {False: set(), True: set()}
    read = AugmentedDataset.read

    def note(self: AugmentedDataset, index: int):
        seen[self.train].add(self.source.path(index))
        return read(self, index)

    monkeypatch.setattr(AugmentedDataset, "read", note)
    assert run(weights, photos, tmp_path / "fast", "--steps", "20") == 0
    assert len(seen[True]) > 40 and len(seen[False]) > 3
    assert not seen[True] & seen[False]


def test_split_follows_from_names_alone(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "moved")
    before = accelerate.split(photos, TWO_CLASSES)
    write_images(tmp_path / "moved" / "foxes", 20)
    after = accelerate.split(tmp_path / "moved", TWO_CLASSES)
    for images, more in zip(before, after, strict=True):
        names, more_names = ({Path(path).relative_to(i.root) for path, _ in i.samples()} for i in (images, more))
        assert names < more_names


class Killed(Exception):
    pass


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, action) -> None:
    """Does it within that optimizer step."""
    update, count = engine.update_weights, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == step:
            action()
        return update(*args)

    monkeypatch.setattr(engine, "update_weights", counted)


@pytest.fixture(scope="module")
def undisturbed(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "fast"
    assert run(weights, photos, output, "--steps", "6") == 0
    return output


def test_resumes_after_a_kill_with_the_same_result(
    undisturbed: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(5, patch, kill)
        with pytest.raises(Killed):
            run(weights, photos, tmp_path / "fast", "--steps", "6")
    assert not (tmp_path / "fast" / "model.safetensors").exists()
    assert run(weights, photos, tmp_path / "fast", "--steps", "6") == 0
    assert_equal(best_weights(tmp_path / "fast"), best_weights(undisturbed))
    assert_equal(saved_weights(tmp_path / "fast"), saved_weights(undisturbed))


def test_ctrl_c_keeps_the_best_so_far_and_can_go_on(
    undisturbed: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(weights, photos, tmp_path / "fast", "--steps", "6") == 0
    assert "holds the best so far" in capsys.readouterr().out.splitlines()[-1]
    assert models.from_pretrained(tmp_path / "fast").reducer == "merge"
    assert run(weights, photos, tmp_path / "fast", "--steps", "6") == 0
    assert_equal(best_weights(tmp_path / "fast"), best_weights(undisturbed))


def one_line_error(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1, lines
    return lines[0]


def test_parts_of_a_data_set_are_no_classes() -> None:
    assert classes_fit(TWO_CLASSES, ["cats", "dogs"]) and not classes_fit(TWO_CLASSES, ["test", "train"])


@pytest.mark.parametrize("other", ["val", "test"])
def test_validation_images_are_not_trained_on(other: str, weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    for part in ("train", other):
        shutil.copytree(photos, tmp_path / "data" / part)
    assert run(weights, tmp_path / "data", tmp_path / "fast") == 2
    assert one_line_error(capsys).endswith(f"--images {tmp_path}/data/train")


def test_many_images_held_back_mean_few_validations() -> None:
    """A validation of 3 times 40 s, in a quarter of 10 minutes: one epoch, and 480 s for steps of half a second."""
    tuning = SimpleNamespace(recipe=SimpleNamespace(epochs=10), seconds_a_step=lambda: 0.5)
    assert accelerate.FineTuning.schedule(tuning, steps=None, minutes=10, seconds=40.0) == (1, 960)


def test_predictors_of_a_dynamic_run_are_left_out(photos: Path, tmp_path: Path, capsys) -> None:
    model = models.create_model("deit_tiny", num_classes=2, pruning_loc=(1, 2), **SIZES)
    torch.save({"model": model.state_dict(), "spec": model.spec.to_dict()}, tmp_path / "checkpoint_best.pth")
    assert run(tmp_path, photos, tmp_path / "fast", "--minutes", "0") == 0
    assert "predictors in --weights are left out" in capsys.readouterr().out
    assert models.from_pretrained(tmp_path / "fast").spec.scorer == "distinct"


def test_few_images_are_merged_without_training(weights: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "few", 12)
    assert run(weights, tmp_path / "few", tmp_path / "fast", "--steps", "2") == 0
    assert "only 12 usable images" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "fast" / "report.json").read_text())["rows"]) == ["dense", "merged"]


def test_files_that_are_no_images_do_not_count(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    for number in range(12):  # held back or not, by their names
        (folder / "cats" / f"broken{number}.jpg").write_bytes(b"no image")
    assert sum(map(len, accelerate.split(folder, TWO_CLASSES))) == 60
    assert "12 file(s)" in capsys.readouterr().out


def test_no_image_is_one_line(weights: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert run(weights, tmp_path / "empty", tmp_path / "fast") == 2
    assert "no image" in one_line_error(capsys)
    assert run(weights, tmp_path / "nowhere", tmp_path / "fast") == 2
    assert "no folder of images" in one_line_error(capsys)
    assert not (tmp_path / "fast").exists()


def test_unknown_models_are_one_line(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    for name, message in (("resnet18", "vision transformer"), ("no_such_model", "unknown arch")):
        words = [name, "--images", photos, "--output", tmp_path / "fast"]
        assert exit_status(lambda words=words: accelerate.command([str(word) for word in words])) == 2
        assert message in one_line_error(capsys)


def test_wish_that_cannot_be_met_tells_the_largest(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    assert run(weights, photos, tmp_path / "fast", "--speedup", "9") == 2
    largest = re.search(r"at most ([\d.]+)", one_line_error(capsys)).group(1)
    assert run(weights, photos, tmp_path / "fast", "--speedup", largest, "--minutes", "0") == 0


def test_existing_output_is_not_touched(weights: Path, photos: Path, tmp_path: Path, undisturbed: Path, capsys) -> None:
    before = saved_weights(undisturbed)
    assert run(weights, photos, undisturbed, "--steps", "30") == 2
    assert "another command (steps 6)" in one_line_error(capsys)
    assert_equal(saved_weights(undisturbed), before)
    (tmp_path / "mine.txt").write_text("precious")
    assert run(weights, photos, tmp_path, "--steps", "2") == 2
    assert "holds other files" in one_line_error(capsys)


def test_unwritable_output_is_one_line(weights: Path, photos: Path, capsys) -> None:
    assert run(weights, photos, Path("/proc/fast")) == 2
    assert "cannot write to --output" in one_line_error(capsys)


def test_without_network_weights_can_be_given(photos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    build = timm.create_model

    def offline(*names: str, pretrained: bool = False, **options):
        if pretrained:
            raise OSError("no network")
        return build(*names, **options)

    monkeypatch.setattr("dynamicvit.models.pretrained.timm.create_model", offline)
    words = ["vit_tiny_patch16_224", "--images", photos, "--output", tmp_path / "fast", "--base-rate", "0.8"]
    assert exit_status(lambda: accelerate.command([str(word) for word in words])) == 2
    assert "give --weights" in one_line_error(capsys)


def test_same_thing_with_all_knobs_under_torchrun(weights: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("train", "val"):
        (data / name).mkdir(parents=True)
        for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:24]):
            shutil.copy(path, data / name / f"{i}.jpg")
    flags = "--scorer attention --reducer merge --distill --cls-weight 0 --epochs 1 --batch-size 4 --num-workers 0"
    command = [*TORCHRUN, "--nproc_per_node", "2"]
    command += [str(ROOT / "main_dynamic_vit.py"), *flags.split(), "--device", "cpu", "--pretrained", str(weights)]
    command += ["--data-path", str(data), "--output-dir", str(tmp_path / "run"), "--pruning-loc", "1", "2", "3"]
    result = launch(command)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert {"val/kl", "val/agreement"} < record.keys() and "val/top1" not in record
