import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PRUNING, TINY_MODEL, write_images
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import (
    REDUCERS,
    SCORERS,
    ModelSpec,
    build_model,
    create_model,
    geometric_keep_rates,
    make_dynamic,
)
from dynamicvit.models.flops import count_gflops
from dynamicvit.tools import sweep, sweep_methods
from dynamicvit.tools.sweep_report import summarize
from PIL import Image

CPU = torch.device("cpu")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "pruning_loc": (1, 2, 3)}
NAMES = [f"{scorer} + {reducer}" for scorer in ("untrained", *list(SCORERS)[1:]) for reducer in REDUCERS]
NAMES += ["merged", "ToMe", "PiToMe"]


def small_model(arch: str = "deit_tiny", num_classes: int = 5, **changes: object) -> torch.nn.Module:
    """Far enough from initialisation that images differ in their answers."""
    torch.manual_seed(1)
    model = create_model(arch, num_classes=num_classes, **{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 255, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_float(batch: torch.Tensor) -> torch.Tensor:
    return batch.float() / 64 - 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights for two classes."""
    path = tmp_path_factory.mktemp("weights") / "dense.pth"
    model = small_model(num_classes=2, dense=True, pruning_loc=None)
    torch.save({"model": model.state_dict()}, path)
    return path


def run(weights: Path, *args: str | Path) -> int:
    flags = ["--pretrained", weights, *TINY_MODEL, *"--batch-size 4 --num-workers 0 --device cpu --amp off".split()]
    flags += PRUNING if "--pruning-loc" not in args else []
    return exit_status(lambda: sweep.command([str(word) for word in (*flags, *args)]))


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv") as file:
        return list(csv.DictReader(file))


def test_sweep(weights: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(weights, "--data-path", image_folder, "--base-rates", "0.9", "0.7", "--output", tmp_path) == 0
    rows = read_rows(tmp_path)
    names = [row["method"].partition(",")[0] for row in rows]
    assert names == ["dense", *NAMES, *NAMES]
    assert {row["place"] for row in rows if row["method"] in NAMES} == {"before"}
    assert "DiffRate is left out: DiffRate's token counts are published for" in capsys.readouterr().out
    assert [float(row["base_rate"]) for row in rows] == [1.0, *[0.9] * len(NAMES), *[0.7] * len(NAMES)]
    dense = rows[0]
    assert (float(dense["agreement"]), float(dense["kl"]), float(dense["top1_change"])) == (100, 0, 0)
    for milder, harder in zip(rows[1 : len(NAMES) + 1], rows[len(NAMES) + 1 :], strict=True):
        assert float(dense["gflops"]) > float(milder["gflops"]) > float(harder["gflops"])
        assert float(milder["kl"]) > 0 and float(milder["images_per_s"]) > 0
    model = small_model(num_classes=2)
    model.set_keep_rates(geometric_keep_rates(0.9, 3))
    assert float(rows[1]["gflops"]) == pytest.approx(count_gflops(model, 32))

    per_image = np.load(tmp_path / "sweep.npz")
    for row, name in zip(rows, names, strict=True):
        key = f"{name} {float(row['base_rate'])}"
        correct, dense_correct = per_image[f"{key} correct"], per_image["dense 1.0 correct"]
        assert len(correct) == 7, "every image once, the last batch too"
        assert float(row["top1"]) == pytest.approx(100 * correct.mean(), abs=1e-3)
        assert float(row["top1_change"]) == pytest.approx(100 * (correct - dense_correct).mean(), abs=1e-3)
        error = per_image[f"{key} kl"].std(ddof=1) / 7**0.5
        assert float(row["kl_se"]) == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert Image.open(tmp_path / "sweep.png").size == (1650, 690)


def test_folder_without_labels(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "photos", 5)
    output = tmp_path / "out"
    methods = ["--methods", "tome", "attention+merge", "--base-rates", "0.6"]
    assert run(weights, "--data-path", tmp_path / "photos", *methods, "--output", output) == 0
    assert "no labels: agreement and KL only" in capsys.readouterr().out
    dense, merged, tome = read_rows(output)
    assert merged["method"] == "attention + merge" and tome["method"].startswith("ToMe, r = ")
    assert {row["top1"] for row in (dense, tome, merged)} == {""}
    assert float(merged["kl"]) > 0


def test_class_folders_that_are_not_the_models(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("ants", "bees", "cats"):
        write_images(tmp_path / "photos" / name, 2)
    one = ["--methods", "random+drop", "--base-rates", "0.6"]
    assert run(weights, "--data-path", tmp_path / "photos", *one, "--output", tmp_path / "out") == 0
    assert "the 3 classes of the images are not the model's 2" in capsys.readouterr().out
    assert {row["top1"] for row in read_rows(tmp_path / "out")} == {""}


def test_class_folders_in_a_folder_of_their_own_are_labels(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    one = ["--methods", "random+drop", "--base-rates", "0.6"]
    assert run(weights, "--data-path", image_folder / "val", *one, "--output", tmp_path / "flat") == 0
    assert run(weights, "--data-path", image_folder, *one, "--output", tmp_path / "val") == 0
    flat, val = read_rows(tmp_path / "flat"), read_rows(tmp_path / "val")
    assert [row["top1"] for row in flat] == [row["top1"] for row in val] != ["", ""]


def test_photos_are_turned_as_in_training(weights: Path, tmp_path: Path) -> None:
    """A run with --exif is compared on upright photos, as its validation was."""
    write_images(tmp_path / "data" / "val" / "cats", 3)
    for path in (tmp_path / "data" / "val" / "cats").iterdir():
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.open(path).save(path, exif=turned)
    kl = {}
    for exif in (True, False):
        content = torch.load(weights) | {"args": {"exif": exif}}
        torch.save(content, tmp_path / "run.pth")
        flags = ["--methods", "attention+drop", "--base-rates", "0.6", "--output", tmp_path / str(exif)]
        assert run(tmp_path / "run.pth", "--data-path", tmp_path / "data", *flags) == 0
        kl[exif] = read_rows(tmp_path / str(exif))[1]["kl"]
    assert kl[True] != kl[False]


def test_how_much_of_a_photo_is_seen(weights: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 5)
    one, kl = ["--methods", "random+drop", "--base-rates", "0.6"], {}
    for crop_pct in (None, "0.875", "1"):
        flags = ["--output", tmp_path / f"crop {crop_pct}", *(["--crop-pct", crop_pct] if crop_pct else [])]
        assert run(weights, "--data-path", tmp_path / "photos", *one, *flags) == 0
        kl[crop_pct] = read_rows(tmp_path / f"crop {crop_pct}")[1]["kl"]
    assert kl[None] == kl["0.875"] != kl["1"]


def test_stages_inside_and_before(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "photos", 5)
    flags = ["--methods", "distinct+merge", "predictor+drop", "--places", "before", "inside", "--base-rates", "0.6"]
    assert run(weights, "--data-path", tmp_path / "photos", *flags, "--output", tmp_path / "out") == 0
    assert "predictor+drop inside blocks is left out" in capsys.readouterr().out
    _, before, inside, _ = read_rows(tmp_path / "out")
    assert [(row["method"], row["place"]) for row in (before, inside)] == [
        ("distinct + merge", "before"),
        ("distinct + merge", "inside"),
    ]
    assert before["kl"] != inside["kl"]
    assert "distinct + merge, inside 0.6 kl" in np.load(tmp_path / "out" / "sweep.npz")


def test_all_at_the_same_cost(weights: Path, tmp_path: Path) -> None:
    """The stages of "merged" are its own, whatever those of the model are."""
    write_images(tmp_path / "photos", 5)
    dense = count_gflops(small_model(num_classes=2, dense=True, pruning_loc=None), 32)
    wish = 0.75 * dense
    flags = ["--methods", "attention+drop", "merged", "tome", "--gflops", str(wish)]
    assert run(weights, "--data-path", tmp_path / "photos", *flags, "--output", tmp_path / "out") == 0
    _, *rows = read_rows(tmp_path / "out")
    assert {row["base_rate"] for row in rows} == {""}
    drop, merged, tome = rows
    assert 0.95 * wish <= float(drop["gflops"]) <= wish
    expected = make_dynamic(small_model(num_classes=2, dense=True, pruning_loc=None), speedup=dense / wish)
    assert float(merged["gflops"]) == pytest.approx(count_gflops(expected, 32))
    assert merged["method"] == f"merged, {len(expected.pruning_loc)} stages" and merged["place"] == "inside"
    assert tome["method"].startswith("ToMe, r = ")
    assert f"merged {float(merged['gflops']):.3f} GFLOPs kl" in np.load(tmp_path / "out" / "sweep.npz")


def test_answers_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = small_model(num_classes=2, dense=True, pruning_loc=None)
    model.head.weight.data.fill_(3e38)  # a number, but what it gives is none
    torch.save({"model": model.state_dict()}, tmp_path / "dense.pth")
    write_images(tmp_path / "photos", 5)
    one = ["--methods", "attention+drop", "--base-rates", "0.6"]
    assert run(tmp_path / "dense.pth", "--data-path", tmp_path / "photos", *one, "--output", tmp_path / "out") == 2
    assert "the answers of dense are not finite" in capsys.readouterr().err


def models_of(model: torch.nn.Module, methods: Sequence[str], trained: bool = False, rate: float = 0.6) -> dict:
    """By name, at this rate."""
    variants = sweep_methods.variants_of(model, methods, (model.place,), trained)
    for variant in variants[1:]:
        variant.model.set_keep_rates(sweep_methods.Level(rate).keep_rates(variant.model))
    others = sweep_methods.others_of(model, methods, sweep_methods.Level(rate))
    return {contestant.name: contestant.model for contestant in (*variants, *others)}


def test_values_of_each_image() -> None:
    """10 images in batches of 4, in turns; the dense model's own answers as labels, but for 3 of them."""
    models = models_of(small_model(), ["attention+drop"])
    batch = images(10)
    with torch.no_grad():
        dense, reduced = (models[name](as_float(batch)) for name in ("dense", "attention + drop"))
    labels = dense.argmax(dim=1)
    labels[[0, 4, 9]] = (labels[[0, 4, 9]] + 1) % 5
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch, labels), batch_size=4)
    answers = sweep.compare(models, loader, as_float, CPU, None, labelled=True)
    assert answers["dense"].correct.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    expected = F.softmax(dense, -1) * (F.log_softmax(dense, -1) - F.log_softmax(reduced, -1))
    np.testing.assert_allclose(answers["attention + drop"].kl, expected.sum(dim=1), rtol=1e-3, atol=1e-6)
    assert answers["attention + drop"].agrees.tolist() == (dense.argmax(1) == reduced.argmax(1)).tolist()


def test_errors_are_paired() -> None:
    """Right on 3 of 4, dense on 2: they differ on three images, by +1, +1 and -1."""
    correct, dense = np.array([1.0, 1, 0, 1]), np.array([0.0, 0, 1, 1])
    blank, seconds = np.zeros(4), np.ones(1)
    row = summarize(sweep.Answers(correct, dense, blank, seconds / 2), sweep.Answers(dense, dense, blank, seconds))
    assert (row["top1"], row["top1_change"], row["speedup"]) == (75, 25, 2)
    assert row["top1_se"] == pytest.approx(25)  # variance 1/4 by n - 1, over 4 images
    assert row["top1_change_se"] == pytest.approx(100 * (11 / 12 / 4) ** 0.5)  # squares about 1/4: 2.75, over 3


@pytest.mark.parametrize("arch", ["deit_tiny", "lvvit_s"])
def test_methods_differ_in_nothing_but_tokens(arch: str) -> None:
    model = small_model(arch)
    models = models_of(model, sweep_methods.METHODS, trained=True)
    assert {"dense", "learned + drop", "learned + merge", "ToMe", "PiToMe"} < set(models)
    x = as_float(images(4))
    with torch.no_grad():
        dense = models["dense"](x)
        differing = [name for name, m in models.items() if not torch.allclose(m(x), dense, atol=1e-4)]
        assert differing == list(models)[1:]
        for name, variant in models.items():
            if name != "dense":
                variant.set_keep_rates([1.0] * len(variant.pruning_loc))
            torch.testing.assert_close(variant(x), dense, atol=1e-4, rtol=1e-4)
            assert next(variant.parameters()).data_ptr() in {p.data_ptr() for p in model.parameters()}
    learned = [models[f"learned + {reducer}"].score_predictor[0].in_conv[1].weight for reducer in ("drop", "merge")]
    assert len({w.data_ptr() for w in (*learned, model.score_predictor[0].in_conv[1].weight)}) == 1


def test_rivals_cost_about_the_same() -> None:
    model = small_model()
    for rate in (0.8, 0.7):
        costs = {name: count_gflops(m, 32) for name, m in models_of(model, sweep_methods.METHODS, rate=rate).items()}
        for name in ("merged", "ToMe", "PiToMe"):
            assert costs[name] == pytest.approx(costs["random + drop"], rel=0.1)


def test_what_a_backbone_cannot_do_is_left_out(capsys: pytest.CaptureFixture) -> None:
    names = list(models_of(small_model(pruning_loc=(0, 2)), ["predictor+drop", "attention+merge"], trained=True))
    assert names == ["dense", "learned + drop"]
    message = "attention+merge before blocks is left out: the attention scorer reads the block before"
    assert message in capsys.readouterr().out

    sizes = {"embed_dim": 8, "depths": (1, 1, 4, 1)}
    model = build_model(ModelSpec("convnext_t", num_classes=3, img_size=32, sizes=sizes, pruning_loc=(1, 2, 3))).eval()
    models = models_of(model, sweep_methods.METHODS, trained=True, rate=0.7)
    with pytest.raises(UserError, match="--gflops is for plain transformers"):
        sweep_methods.levels_of(model, (), [1.0])
    assert list(models) == ["dense", "learned"]
    assert capsys.readouterr().out.count("\n") == 1
    assert models["learned"].keep_rates == pytest.approx((0.7, 0.5, 0.3))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data-path", "nowhere"], "no data folder nowhere"),
        (["--base-rates", "0.5", "0"], "above 0 and at most 1"),
        (["--batch-size", "0"], "must be positive, got 0"),
        (["--device", "toaster"], "unknown device toaster"),
        (["--scorer", "random"], "--scorer is what a sweep varies"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--gflops", "9"], "--gflops 9: the dense model needs no more than"),
        (["--gflops", "1", "--base-rates", "0.7"], "not allowed with argument"),
    ],
)
def test_user_errors_are_one_line(
    args: list[str], message: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(weights, *args, "--output", tmp_path) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_missing_matplotlib_is_said_before_any_work(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "Figure", None)
    assert run(weights) == 2
    assert capsys.readouterr().err == "error: the plot needs matplotlib; get it: pip install matplotlib\n"
