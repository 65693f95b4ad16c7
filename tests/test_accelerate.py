"""tools.accelerate: what it leaves, what it never trains on, resuming, and what users do wrong."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ONE_THREAD, ROOT, TORCHRUN, launch, write_images
from dynamicvit.datasets import AugmentedDataset, classes_fit, eval_transform
from dynamicvit.errors import UserError, exit_status
from dynamicvit.image_files import ImageFiles
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.stages import FOR_FEATURES, FOR_SPEED
from dynamicvit.recipe import RECIPES
from dynamicvit.signals import Stopped
from dynamicvit.tools import accelerate, accelerate_output, accelerate_report, comparison, finetune, speedup, splits
from dynamicvit.tools.dense import as_size
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

import dynamicvit
from dynamicvit import engine, models

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TWO_CLASSES = models.ModelSpec(num_classes=2, img_size=32)
QUICK = "--base-rate 0.7 --num-workers 0 --device cpu --batch-size 8".split()
FAST = {"base_rate": 0.7, "num_workers": 0, "device": "cpu", "batch_size": 8}


def dense_model(num_classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = models.create_model("deit_tiny", dense=True, num_classes=num_classes, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():  # far from 0, so that answers differ
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def save_weights(path: Path, num_classes: int) -> Path:
    model = dense_model(num_classes)
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
        entry = RECIPES["label-free"]
        patch.setitem(RECIPES, "label-free", replace(entry, recipe=replace(entry.recipe, epochs=2)))
        yield


@pytest.fixture(autouse=True)
def handlers_stay():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(weights: Path, photos: Path, output: Path | str, *more: str, how: list[str] = QUICK) -> None:
    words = ["deit_tiny", "--weights", weights, "--images", photos, "--output", output, *how, *more]
    accelerate.command([str(word) for word in words])


def run(*words: Path | str, how: list[str] = QUICK) -> int:
    return exit_status(lambda: call(*words, how=how))


def report_of(output: Path) -> accelerate_report.Report:
    return accelerate_report.Report.read(output / "report.json")


def saved_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def best_weights(output: Path) -> dict[str, torch.Tensor]:
    return models.read_checkpoint(output / "training" / "checkpoint_last.pth")["model"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_whole_command_on_labelled_images(weights: Path, photos: Path, tmp_path: Path) -> None:
    how = "--flops-speedup 1.3 --num-workers 0 --device cpu --batch-size 8".split()
    words = ["deit_tiny", "--weights", weights, "--images", photos, "--output", tmp_path / "fast", *how]
    command = [sys.executable, "-m", "dynamicvit.tools.cli", "accelerate", *map(str, words), "--steps", "2"]
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
    assert all(row[f"images_per_s_{size}"] > 0 for row in report["rows"].values() for size in (1, 8))
    assert report["saved"] == min(("merged", "fine-tuned"), key=lambda name: report["rows"][name]["kl"])
    assert str(tmp_path) not in json.dumps(report)  # it may be published
    assert "training" in result.stdout and "may be deleted" in result.stdout
    page = (tmp_path / "fast" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert "<script" not in page and not re.search(r"(src|href)=['\"](?!data:)", page)
    model = models.from_pretrained(tmp_path / "fast")
    assert model.spec.reducer == FOR_SPEED.reducer and model.spec.class_names == ("cats", "dogs")


def test_class_folders_that_cannot_be_printed(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They cannot name a saved model's classes, but are no reason to lose the model either."""
    for name in ("cats", "dogs\x1b[31m\n"):
        write_images(tmp_path / "photos" / name, 6)
    (tmp_path / "photos" / "cats" / "\n.jpg").write_text("no image")
    assert run(weights, tmp_path / "photos", tmp_path / "fast", "--steps", "0") == 0
    assert models.from_pretrained(tmp_path / "fast").spec.class_names is None
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


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


def test_a_model_for_its_features(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    """Its class token and 16 patches' features beside the dense model's, which it has learned from."""
    how = "--flops-speedup 1.3 --num-workers 0 --device cpu --batch-size 8 --steps 10 --for features".split()
    assert run(weights, photos, tmp_path / "fast", how=how) == 0
    report, fast = report_of(tmp_path / "fast"), models.from_pretrained(tmp_path / "fast")
    assert fast.spec.scorer == FOR_FEATURES.scorer and fast.spec.place == FOR_FEATURES.place
    assert report.saved == "fine-tuned" and report.rows["dense"]["cosine"] == pytest.approx(1)
    held_back = splits.decode(splits.split_images(photos, fast.spec).held_back, fast.spec, 0).images
    shown, dense = fast.spec.preprocessing.normalise(held_back), dense_model().eval()
    with torch.inference_mode():
        merged = speedup.make_faster(dense_model(), fast.spec).eval()
        found, expected = fast.forward_features(shown), dense.forward_features(shown)
        cosines = {
            name: nn.functional.cosine_similarity(model.forward_features(shown), expected, dim=-1)
            for name, model in {"fine-tuned": fast, "merged": merged}.items()
        }
    assert found.shape == (len(held_back), 17, 32)
    for name, each in cosines.items():
        assert report.rows[name]["cosine"] == pytest.approx(each.mean().item(), abs=1e-5)
        assert report.rows[name]["worst"] == pytest.approx(each.sort().values[:, :2].mean().item(), abs=1e-5)
    assert report.rows["fine-tuned"]["cosine"] > report.rows["merged"]["cosine"]
    assert report.history[-1]["val/cosine"] == pytest.approx(report.rows["fine-tuned"]["cosine"], abs=0.01)
    gflops = [count_gflops(model, 32, features=True) for model in (dense, fast)]
    assert [report.rows[name]["gflops"] for name in ("dense", "merged")] == pytest.approx(gflops)
    assert "worst tenth of each image's tokens" in str(report)
    page = (tmp_path / "fast" / "report.html").read_text()
    assert "principal components" in page and "model.forward_features(" in page
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "image-feature-extraction" in card and "model.forward_features(" in card
    assert run(weights, photos, tmp_path / "fast", how=how[:-2]) == 2  # for answers
    assert "another command (purpose features)" in one_line_error(capsys)


def test_images_need_not_be_square_and_precision_is_that_of_use(weights: Path, photos: Path, tmp_path: Path) -> None:
    how = "--flops-speedup 1.3 --num-workers 0 --device cpu --minutes 0 --for features --amp bf16 --input-size".split()
    assert run(weights, photos, tmp_path / "fast", "32", "48", how=how) == 0
    fast = models.from_pretrained(tmp_path / "fast")
    assert fast.spec.img_size == (32, 48) and fast.forward_features(torch.zeros(1, 3, 32, 48)).shape == (1, 25, 32)
    assert report_of(tmp_path / "fast").rows["merged"]["gflops"] == count_gflops(fast, (32, 48), features=True)
    with pytest.raises(UserError, match="one side, or height and width, not 3 numbers"):
        as_size([32, 48, 64])


def test_the_search_by_the_clock_is_of_features(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def time_models(use: object, size: int, found: dict[str, nn.Module]) -> dict[str, float]:
        timed.extend(model(torch.zeros(1, 3, 32, 32)).shape for model in found.values())
        return {name: 1 / (1 + (name != "dense")) for name in found}

    monkeypatch.setattr(speedup, "time_models", time_models)
    monkeypatch.setattr(accelerate, "time_models", time_models)
    how = {"minutes": 0, "for_batch": 2, "num_workers": 0, "device": "cpu"}
    model, report = dynamicvit.accelerate(dense_model(), photos, 1.9, purpose="features", **how)
    assert len(timed) > 4 and set(timed) == {(1, 17, 32)}
    assert model.spec.scorer == FOR_FEATURES.scorer and report.saved == "merged"
    with pytest.raises(UserError, match="for its answers or its features, not for 'feature'"):
        dynamicvit.accelerate(dense_model(), photos, purpose="feature")


def test_neighbours_by_hand() -> None:
    dense = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    moved = torch.tensor([[1.0, 0.0], [0.3, 1.0], [0.0, 1.0]])  # the second is now nearest to the third
    assert comparison.same_neighbour(dense, dense).all()
    assert comparison.same_neighbour(moved, dense).tolist() == [True, False, True]


def test_standard_errors_by_hand() -> None:
    mean, error = comparison.summarise(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, error) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    share, error = comparison.summarise(torch.arange(102) < 97)
    assert share == pytest.approx(100 * 97 / 102) and error == pytest.approx(2.3, abs=0.1)
    assert comparison.summarise(torch.ones(26, dtype=torch.bool)) == (100, pytest.approx(3.6, abs=0.1))


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
    """5 minutes less 10 times 3 measurements of 2 s, at 0.5 s a step: 480 steps."""
    tuning = SimpleNamespace(recipe=SimpleNamespace(epochs=10), seconds_a_step=lambda: 0.5)
    assert finetune.FineTuning.schedule(tuning, finetune.Budget(minutes=5), seconds=2.0) == (10, 48)


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
    before = splits.split_images(photos, TWO_CLASSES)
    write_images(tmp_path / "moved" / "foxes", 20)
    after = splits.split_images(tmp_path / "moved", TWO_CLASSES)
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
    undisturbed: Path, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped, match="holds the best so far"):
            call(weights, photos, tmp_path / "fast", "--steps", "6")
    assert models.from_pretrained(tmp_path / "fast").spec.reducer == FOR_SPEED.reducer
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
    assert one_line_error(capsys).endswith(f"give one: {tmp_path}/data/train")


def test_many_images_held_back_mean_few_validations() -> None:
    """A validation of 3 times 40 s, in a quarter of 10 minutes: one epoch, and 480 s for steps of half a second."""
    tuning = SimpleNamespace(recipe=SimpleNamespace(epochs=10), seconds_a_step=lambda: 0.5)
    assert finetune.FineTuning.schedule(tuning, finetune.Budget(minutes=10), seconds=40.0) == (1, 960)


def test_predictors_of_a_dynamic_run_are_left_out(photos: Path, tmp_path: Path, capsys) -> None:
    model = models.create_model("deit_tiny", num_classes=2, pruning_loc=(1, 2), **SIZES)
    torch.save({"model": model.state_dict(), "spec": model.spec.to_dict()}, tmp_path / "checkpoint_best.pth")
    assert run(tmp_path, photos, tmp_path / "fast", "--minutes", "0") == 0
    assert "predictors in the weights are left out" in capsys.readouterr().out
    assert models.from_pretrained(tmp_path / "fast").spec.scorer == FOR_SPEED.scorer


def test_a_dynamic_model_is_made_faster_anew_and_says_so(photos: Path) -> None:
    dynamic = models.make_dynamic(dense_model(), (1,), (0.5,), "attention", "drop")
    model, report = dynamicvit.accelerate(dynamic, photos, **FAST, minutes=0)
    assert "already dynamic" in report.notes[0] and model.spec.scorer == FOR_SPEED.scorer


def test_other_class_names_are_another_command(photos: Path, tmp_path: Path) -> None:
    how = FAST | {"minutes": 0, "output": tmp_path / "fast"}
    dynamicvit.accelerate(dense_model(), photos, class_names=["cat", "dog"], **how)
    with pytest.raises(UserError, match="another command"):
        dynamicvit.accelerate(dense_model(), photos, class_names=["dog", "cat"], **how)


def test_a_base_rate_that_cannot_be_is_the_users_error(photos: Path) -> None:
    with pytest.raises(UserError, match="must lie in"):
        dynamicvit.accelerate(dense_model(), photos, **FAST | {"base_rate": 1.5})


def test_one_image_has_no_standard_error(weights: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "one", 1)
    assert run(weights, tmp_path / "one", tmp_path / "fast", "--steps", "0") == 0
    for name in ("report.json", "config.json"):
        json.loads((tmp_path / "fast" / name).read_text(), parse_constant=pytest.fail)  # Infinity is not valid JSON


def test_few_images_are_merged_without_training(weights: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "few", 12)
    assert run(weights, tmp_path / "few", tmp_path / "fast", "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "only 12 usable images" in out and out.count("times as fast as the dense model at batch") == 1
    assert list(json.loads((tmp_path / "fast" / "report.json").read_text())["rows"]) == ["dense", "merged"]


def test_files_that_are_no_images_do_not_count(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    for number in range(12):  # held back or not, by their names
        (folder / "cats" / f"broken{number}.jpg").write_bytes(b"no image")
    assert sum(map(len, splits.split_images(folder, TWO_CLASSES))) == 60
    assert "12 file(s)" in capsys.readouterr().out


def test_no_image_is_one_line(weights: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert run(weights, tmp_path / "empty", tmp_path / "fast") == 2
    assert "no image" in one_line_error(capsys)
    assert run(weights, tmp_path / "nowhere", tmp_path / "fast") == 2
    assert "no folder of images" in one_line_error(capsys)
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "no transformer blocks"),
        ("vit_smal_patch16_224", "did you mean .*vit_small_patch16_224"),
        ("vit_small_patch16_224.augreg_in1", "vit_small_patch16_224.augreg_in1k"),
        ("deit_smal", "did you mean deit_small"),
        ("swin_t", "no transformer blocks"),
    ],
)
def test_models_that_cannot_be_had_are_one_line(name: str, message: str, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr("dynamicvit.tools.dense.dense_weights", lambda *_: pytest.fail("weights are downloaded first"))
    with pytest.raises(UserError, match=message):
        dynamicvit.accelerate(name, photos, 1.3, device="cpu", num_workers=0)


def test_wish_that_cannot_be_met_tells_the_largest(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    how = [*"--num-workers 0 --device cpu --minutes 0 --flops-speedup".split()]
    assert run(weights, photos, tmp_path / "fast", "9", how=how) == 2
    largest = re.search(r"at most ([\d.]+)", one_line_error(capsys)).group(1)
    assert run(weights, photos, tmp_path / "fast", largest, how=how) == 0


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
    assert "cannot write to the output" in one_line_error(capsys)
    assert run(weights, photos, "") == 2
    assert "--output" in one_line_error(capsys)
    for empty in ({"images": ""}, {"images": photos, "output": ""}, {"images": photos, "weights": ""}):
        with pytest.raises(UserError, match="empty"):
            dynamicvit.accelerate(dense_model(), **empty)


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


# --- A speed-up in time


def timer_of(overhead: float) -> Callable[[dict[str, nn.Module]], dict[str, float]]:
    """A machine on which a block takes as long as it has tokens, and a stage a share of the dense model's time."""

    def ratios(found: dict[str, nn.Module]) -> dict[str, float]:
        return {name: 1 / time_of(model) for name, model in found.items() if name != "dense"}

    def time_of(model: nn.Module) -> float:
        depth, share, total = len(model.blocks), 1.0, 0.0
        for block in range(depth):
            share = dict(zip(model.pruning_loc, model.keep_rates, strict=True)).get(block, share)
            total += share / depth
        return total + overhead * len(model.pruning_loc)

    return ratios


def tall() -> nn.Module:
    torch.manual_seed(0)
    return models.create_model("deit_tiny", dense=True, num_classes=2, **(SIZES | {"img_size": 64, "depth": 8}))


def test_rates_follow_until_the_time_is_met() -> None:
    """Of the layouts that reach it, the one that changes the answers least is taken, whatever their multiply-adds."""
    dense, timer, asked = tall(), timer_of(0.01), []

    def prefers_many_stages(model: nn.Module) -> float:
        asked.append(len(model.pruning_loc))
        return -asked[-1]

    spec = speedup.choose_spec(dense, speedup.Wish(speedup=1.4), timer, prefers_many_stages)
    assert len(spec.pruning_loc) == max(asked) and len(asked) > 1
    fast = speedup.make_faster(speedup.share_weights(dense), spec)
    assert timer({"dense": dense, "fast": fast})["fast"] == pytest.approx(1.4, rel=0.06)


def test_layouts_that_are_too_slow_are_not_taken() -> None:
    spec = speedup.choose_spec(tall(), speedup.Wish(speedup=1.2), timer_of(0.1), lambda model: -len(model.pruning_loc))
    assert len(spec.pruning_loc) == 3  # with more stages it cannot be met


def test_a_wish_that_no_layout_meets_tells_the_limit() -> None:
    dense, wish = tall(), speedup.Wish(speedup=1.9)
    with pytest.raises(UserError, match=r"at most 1\.[2-7]\d"):
        speedup.choose_spec(dense, wish, timer_of(0.06), lambda model: 0.0)
    with pytest.raises(UserError, match="nothing to gain"):
        speedup.choose_spec(dense, wish, timer_of(0.3), lambda model: 0.0)


def test_time_is_measured_at_the_batch_and_in_the_precision_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    dense = tall().to(torch.bfloat16).eval()
    dense.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape, inputs[0].dtype)))
    use = speedup.Deployment.on(torch.device("cpu"), 3, "bf16")
    assert speedup.time_models(use, 64, {"dense": dense})["dense"] > 0
    assert set(seen) == {((3, 3, 64, 64), torch.bfloat16)}


def test_a_batch_too_large_for_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(UserError, match="out of GPU memory with 3 images at a time; give a lower --for-batch"):
        speedup.time_models(speedup.Deployment.on(torch.device("cpu"), 3), 64, {"dense": fill})


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_whole_search_by_the_clock(amp: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup, "time_models", lambda use, size, found: {n: 1 / (1 + (n != "dense")) for n in found})
    monkeypatch.setattr(accelerate, "time_models", speedup.time_models)
    how = {"minutes": 0, "for_batch": 2, "amp": amp, "num_workers": 0, "device": "cpu"}
    model, report = dynamicvit.accelerate(dense_model(), photos, 1.9, output=tmp_path / "fast", **how)
    assert report.speedups == {2: 2, 1: 2}
    assert str(report).startswith("2.00 times as fast as the dense model at batch 2 in ")
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_a_slower_model_is_called_slower_first() -> None:
    rows = {"dense": {"gflops": 2.0, "images_per_s_8": 100.0}, "merged": {"gflops": 1.0, "images_per_s_8": 91.0}}
    rows["merged"] |= {"agreement": 96.5, "agreement_error": 0.5, "kl": 0.01, "kl_error": 0.001, "images": 102}
    report = accelerate_report.Report({}, model=models.ModelSpec(num_classes=2).to_dict(), rows=rows, saved="merged")
    report = dataclasses.replace(report, batch_sizes=[8], use="batch 8")
    assert str(report).startswith("This model is SLOWER than the dense one. 0.91 times as fast")
    assert "96.5 +- 0.5 % of 102 images" in str(report)


# --- In Python


def test_a_model_object_or_folder_is_left_as_it_is(photos: Path, tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    fast, report = dynamicvit.accelerate(vit, sorted(photos.rglob("*.jpg")), steps=2, **FAST)
    assert_equal(vit.state_dict(), before)
    models.save_pretrained(vit, tmp_path / "dense")
    again, _ = dynamicvit.accelerate(str(tmp_path / "dense"), photos, minutes=0, **FAST)
    assert again.spec.num_classes == 2
    assert not hasattr(vit, "pruning_loc") and fast.spec.reducer == FOR_SPEED.reducer and not fast.training
    assert fast.train()(torch.randn(2, 3, 64, 64)).shape == (2, 2)  # logits, for a user's own training
    assert report.saved in ("merged", "fine-tuned") and "top1" not in report.rows["dense"]


def test_a_loader_gives_the_images_as_the_model_takes_them(photos: Path) -> None:
    preprocessing = models.Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    spec = dataclasses.replace(TWO_CLASSES, preprocessing=preprocessing)
    transform = Compose([Resize((32, 32)), ToTensor(), Normalize(preprocessing.mean, preprocessing.std)])
    loader = DataLoader(ImageFolder(str(photos), transform), batch_size=7, shuffle=True)
    split = splits.split_images(loader, spec)
    assert len(split.training) + len(split.held_back) == 60 and not {*split.training.indices} & {
        *split.held_back.indices
    }
    image, label = split.training[0]
    expected, expected_label = loader.dataset[split.training.indices[0]]
    torch.testing.assert_close(preprocessing.normalise(image), expected)
    assert label == expected_label
    model, report = dynamicvit.accelerate(dense_model(), loader, steps=2, **FAST)
    assert "top1" in report.rows["dense"] and model.spec.num_classes == 2


def test_loaders_that_cannot_be_used_are_refused() -> None:
    for images, message in ((torch.zeros(60, 3, 16, 16), "16 x 16"), (torch.zeros(60, 5), "float tensors")):
        with pytest.raises(UserError, match=message):
            splits.split_images(DataLoader(TensorDataset(images)), built(TWO_CLASSES))


# --- What is wrong is said, and refused


def test_answers_that_are_not_finite_are_refused(photos: Path) -> None:
    model = dense_model()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        dynamicvit.accelerate(model, photos, minutes=0, **FAST)


@pytest.mark.parametrize(
    "wishes",
    [
        {"speedup": 1.5, "base_rate": 0.8},
        {"flops_speedup": 1.5, "keep_rates": (0.8,)},
        {"minutes": 1, "steps": 10},
    ],
)
def test_wishes_that_exclude_each_other(wishes: dict, photos: Path, weights: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        dynamicvit.accelerate(dense_model(), photos, **wishes)
    words = [str(word) for name, value in wishes.items() for word in (f"--{name.replace('_', '-')}", value)]
    words = [word.strip("(),") for word in words]
    assert run(weights, photos, tmp_path / "fast", *words, how=[]) == 2
    assert "exclude each other" in one_line_error(capsys)
    assert not (tmp_path / "fast").exists()


def test_what_a_loader_adapts_reaches_log_and_report(photos: Path, tmp_path: Path, capsys) -> None:
    large = models.create_model("deit_tiny", dense=True, num_classes=2, **(SIZES | {"img_size": 64}))
    torch.save(large.state_dict() | {}, tmp_path / "large.pth")
    spec = large.spec.to_dict() | {"img_size": 32}
    torch.save({"model": large.state_dict(), "spec": spec}, tmp_path / "large.pth")
    assert run(tmp_path / "large.pth", photos, tmp_path / "fast", "--minutes", "0") == 0
    assert "interpolated" in capsys.readouterr().out
    assert "interpolated" in " ".join(report_of(tmp_path / "fast").notes)


def test_classes_and_preprocessing_of_own_weights(weights: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "names.txt").write_text("Katze\nHund\n")
    own = f"--class-names {tmp_path}/names.txt --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2 --minutes 0".split()
    assert run(weights, photos, tmp_path / "fast", *own) == 0
    assert "crop-pct" in capsys.readouterr().out  # what is still assumed
    spec = models.from_pretrained(tmp_path / "fast").spec
    assert spec.class_names == ("Katze", "Hund") and spec.preprocessing.mean == (0.5, 0.5, 0.5)
    (tmp_path / "names.txt").write_text("Katze\n")
    assert run(weights, photos, tmp_path / "other", *own) == 2
    assert "1 class names for 2 classes" in one_line_error(capsys)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"settings": 1}',
        '{"settings": {}, "unknown": 1}',
        '{"settings": {}, "rows": {"dense": 3}}',
        '{"settings": {}, "schedule": ["a", "b"]}',
        '{"settings": {}, "model": {"arch": 7}}',
        "[" * 100_000,
    ],
)
def test_a_report_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="choose another output"):
        report_of(tmp_path)


def test_images_damaged_behind_their_header_are_left_out(photos: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    whole = splits.split_images(folder, TWO_CLASSES).held_back
    damaged = Path(whole.path(1))
    damaged.write_bytes(damaged.read_bytes()[:700])
    decoded = splits.decode(splits.split_images(folder, TWO_CLASSES).held_back, built(TWO_CLASSES), 0)
    assert len(decoded) == len(whole) - 1 and damaged.name in capsys.readouterr().out
    expected = eval_transform(32, models.Preprocessing())(whole[2][0])
    assert torch.equal(decoded[1][0], expected)


def built(spec: models.ModelSpec) -> models.ModelSpec:
    return dataclasses.replace(spec, preprocessing=models.Preprocessing())


def test_large_photos_are_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    Image.effect_noise((800, 640), 50).convert("RGB").save(tmp_path / "large.jpg")
    samples = [(str(tmp_path / "large.jpg"), 0)]
    assert splits.PhotoFiles(samples, (), tmp_path, short_side=100)[0][0].size == (200, 160)
    assert splits.PhotoFiles(samples, (), tmp_path)[0][0].size == ImageFiles(samples, (), tmp_path)[0][0].size


def test_ctrl_c_before_there_is_a_model(weights: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    predict = comparison.predict_all

    def interrupted(*arguments: object) -> comparison.Answers:
        os.kill(os.getpid(), signal.SIGINT)
        return predict(*arguments)

    monkeypatch.setattr(accelerate, "predict_all", interrupted)
    with pytest.raises(Stopped, match="before there was a model"):
        call(weights, photos, tmp_path / "fast", "--steps", "2")


def test_where_checkpoints_do_not_fit_the_model_does(weights: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda path: usage)
    assert run(weights, photos, tmp_path / "fast", "--steps", "2") == 0
    assert "fine-tuned" in report_of(tmp_path / "fast").rows
    assert not (tmp_path / "fast" / "training").exists() and models.from_pretrained(tmp_path / "fast")


def test_a_full_disk_costs_the_training_and_not_the_model(weights, photos, tmp_path: Path, monkeypatch, capsys) -> None:
    save = models.save_pretrained

    def save_if_there_is_room(model: nn.Module, folder: Path, *rest: object, **notes: object) -> None:
        if (folder / "training").exists():
            raise models.CheckpointError("cannot save") from OSError("no space left on device")
        save(model, folder, *rest, **notes)

    monkeypatch.setattr(accelerate_output, "save_pretrained", save_if_there_is_room)
    assert run(weights, photos, tmp_path / "fast", "--steps", "2") == 0
    assert models.from_pretrained(tmp_path / "fast") and "the disk is full" in capsys.readouterr().out


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
