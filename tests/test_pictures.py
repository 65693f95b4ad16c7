import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamicvit.data.shapes import Shapes
from dynamicvit.datasets import AugmentedDataset, BatchTransform, DataOptions, eval_transform
from dynamicvit.errors import exit_status
from dynamicvit.models import ModelSpec, Preprocessing, build_model, pictures, save_pretrained
from dynamicvit.runs.checkpoints import Progress
from dynamicvit.runs.output import Output
from dynamicvit.tools import visualize
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

GRID, KEPT = (4, 4), (9, 5, 3)  # of SPEC: 16 patches, of which int(16 * 0.6 ** stage) stay
SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SPEC = ModelSpec("deit_tiny", base_rate=0.6, num_classes=2, img_size=32, sizes=SIZES, pruning_loc=(1, 2, 3))
CONVNEXT = ModelSpec(
    "convnext_t", 0.5, num_classes=2, img_size=64, sizes={"embed_dim": 8, "depths": (1, 1, 3, 1)}, pruning_loc=(1, 2)
)
SWIN_SIZES = {"embed_dim": 8, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
SWIN = replace(CONVNEXT, arch="swin_t", sizes=SWIN_SIZES)
MERGE = replace(SPEC, scorer="attention", reducer="merge")
FAMILIES = {
    "predictor, drop": SPEC,
    "attention, merge": MERGE,
    "distinct, merge": replace(MERGE, scorer="distinct"),
    "random, drop": replace(SPEC, scorer="random"),
    "lvvit": replace(SPEC, arch="lvvit_s"),
    "swin": SWIN,
    "convnext": CONVNEXT,
}


def random_image(height: int, width: int) -> Tensor:
    """Without white, so that whitened pixels can be told from the image's own."""
    return torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_model(spec: ModelSpec = SPEC) -> nn.Module:
    torch.manual_seed(1)
    model = build_model(spec).eval()
    for parameter in model.parameters():  # far enough from initialisation that images differ in their scores
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_run(model: nn.Module, path: Path, **args: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "spec": model.spec.to_dict(), "args": args}, path)


def run(*args: str | Path) -> int:
    return exit_status(lambda: visualize.command([*map(str, args)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/<class> with images grayscale and odd among them, and the checkpoint of a model for them in run/."""
    root = tmp_path_factory.mktemp("data")
    for name in ("cats", "dogs"):
        (root / "val" / name).mkdir(parents=True)
    pixels = random_image(60, 90).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0]).save(root / "val" / "cats" / "gray.png")
    Image.fromarray(pixels[:33, :81]).save(root / "val" / "cats" / "odd.png")
    Image.fromarray(pixels[:32, :32]).save(root / "val" / "dogs" / "small.png")
    (root / "val" / "notes.txt").write_text("no image")
    save_run(tiny_model(), root / "run" / "checkpoint_last.pth", data_path=str(root), data_set="IMNET")
    return root


@pytest.mark.parametrize(("grid", "patch"), [((4, 4), (8, 8)), ((2, 3), (5, 5)), ((3, 2), (4, 7)), ((1, 5), (16, 16))])
def test_exactly_the_dropped_patches_are_white(grid: tuple[int, int], patch: tuple[int, int]) -> None:
    (rows, columns), (patch_height, patch_width) = grid, patch
    height, width = rows * patch_height, columns * patch_width
    image = random_image(height, width)
    groups = torch.full((3, rows * columns), -1)
    stages = [[0, 3, 4], [3, 4], [4]]
    for stage, kept in enumerate(stages):
        groups[stage, kept] = torch.tensor(kept)
    gap = pictures.GAP
    strip = pictures.strip(image, groups, grid)
    assert strip.dtype == torch.uint8
    expected = torch.full((3, height + 2 * gap, 4 * width + 5 * gap), pictures.PAGE, dtype=torch.uint8)
    for panel, kept in enumerate([range(rows * columns), *stages]):
        for y in range(height):
            for x in range(width):
                is_kept = (y // patch_height) * columns + x // patch_width in kept
                expected[:, gap + y, gap + panel * (width + gap) + x] = image[:, y, x] if is_kept else 255
    assert torch.equal(strip, expected)


def test_merged_patches_share_their_mean_colour() -> None:
    """Patches 0 and 1 of 2 x 3 are one token, and so are 3 and 5, which do not touch; 2 and 4 are as they were."""
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    for patch, colour in enumerate([(10, 0, 0), (30, 0, 100), (0, 50, 0), (90, 90, 90), (7, 8, 9), (110, 70, 0)]):
        row, column = divmod(patch, 3)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.tensor(colour)[:, None, None]
    image[:, 6, 6] = 200  # a detail inside patch 4
    panel = pictures.stage_panel(image, torch.tensor([1, 1, 2, 3, 4, 3]), (2, 3))

    assert torch.equal(panel[:, :4, :8], torch.tensor([20, 0, 50], dtype=torch.uint8)[:, None, None].expand(3, 4, 8))
    for left in (0, 8):  # except the first row and column, which have the border to another group
        inside = panel[:, 5:, left + 1 : left + 4].flatten(1)
        assert torch.equal(inside, torch.tensor([[100], [80], [45]], dtype=torch.uint8).expand(3, 9))
    assert torch.equal(panel[:, 5:, 5:8], image[:, 5:, 5:8])
    border = (panel != image).all(dim=0) & (panel > 180).all(dim=0)
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4, :] = True  # between the rows every pair of patches has one that has merged
    expected[:4, 8] = expected[4:, 4] = expected[4:, 8] = True  # and none between 0 and 1
    assert torch.equal(border, expected)


def test_unmerged_neighbours_have_no_border() -> None:
    image = random_image(8, 16)
    assert torch.equal(pictures.stage_panel(image, torch.arange(8), (2, 4)), image)


def test_fast_path_is_faded_and_kept_locations_are_as_they_were() -> None:
    image = random_image(8, 8)
    image[:, :4, 4:] = torch.tensor([0, 90, 180], dtype=torch.uint8)[:, None, None]
    panel = pictures.stage_panel(image, torch.tensor([0, -1, 2, 3]), (2, 2), fast_path=True)
    assert torch.equal(panel[:, 4:], image[:, 4:]) and torch.equal(panel[:, :4, :4], image[:, :4, :4])
    assert (panel[:, :4, 4:] == round(0.7 * 232 + 0.3 * 90)).all(), "grey, and lighter"


def test_grid_that_does_not_divide_the_picture() -> None:
    """As of a ConvNeXt on images of 7 pixels: 3 locations in a row."""
    spread = pictures.spread_patches(torch.arange(6).view(2, 3), torch.zeros(3, 5, 7))
    assert spread.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 4, 4, 5, 5]] * 2


@pytest.mark.parametrize(
    ("stages", "shown"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3]), (9, [0, 4, 8]), (10, [0, 4, 9])]
)
def test_shown_stages_are_the_first_the_last_and_one_between(stages: int, shown: list[int]) -> None:
    assert pictures.shown_stages(stages) == shown
    image = random_image(8, 8)
    groups = torch.arange(4).expand(stages, 4)
    width = (len(shown) + 1) * (8 + 6) + 6
    assert pictures.strip(image, groups, (2, 2)).shape == (3, 20, width)
    assert pictures.heat_strip(image, torch.rand(stages, 4), (2, 2)).shape == (3, 20, width)


def test_heat_map_is_lightest_where_the_score_peaks() -> None:
    scores = torch.tensor([0.2, 0.5, 0.1, torch.nan, 0.9, 0.3])
    image = torch.full((3, 8, 15), 100, dtype=torch.uint8)
    picture = pictures.heat_map(scores, (2, 3), image)
    patches = picture.float().unfold(1, 4, 4).unfold(2, 5, 5)  # (3, 2, 3, 4, 5)
    assert torch.equal(patches, patches[..., :1, :1].expand_as(patches)), "a patch has one colour"
    lightness = patches.mean(dim=(0, 3, 4)).flatten()
    assert lightness.argsort(descending=True).tolist() == [3, 4, 1, 5, 0, 2]
    assert lightness[3] == 255 > lightness[4]
    assert len(pictures.heat_map(torch.ones(6), (2, 3), image).unique()) <= 3, "equal scores have one colour"
    assert (pictures.heat_map(torch.full((6,), torch.nan), (2, 3), image) == 255).all()


def test_heat_map_shows_scores_of_any_spread() -> None:
    """One peak a thousand times above the others: these still differ by even steps."""
    levels = pictures.rank_levels(torch.tensor([1e-6, 5.0, 3e-6, torch.nan, 2e-6, 3e-6]))
    torch.testing.assert_close(levels, torch.tensor([0, 1, 2 / 3, torch.nan, 1 / 3, 2 / 3]), equal_nan=True)


def test_merged_patches_have_the_score_of_their_token() -> None:
    nan = torch.nan
    scores = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [nan, 0.5, nan, 0.6], [nan, 0.7, nan, nan]]])
    groups = torch.tensor([[[1, 1, -1, 3], [1, 1, -1, 1], [1, 1, -1, 1]]])
    shared = pictures.share_scores(scores, groups)
    expected = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, nan, 0.6], [0.7, 0.7, nan, 0.7]]])
    torch.testing.assert_close(shared, expected, equal_nan=True)


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_every_family_can_be_drawn(spec: ModelSpec) -> None:
    """What TensorBoard shows of a run; and prune leaves the model as it was."""
    model, size = tiny_model(spec), spec.img_size
    images = torch.stack([random_image(size, size), random_image(size, size).flip(2)])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    trace = pictures.prune(model, images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(3)
    with torch.no_grad():
        logits = model.eval()(BatchTransform(torch.device("cpu"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images))
    torch.testing.assert_close(trace.logits, logits)
    finite = trace.scores[trace.scores.isfinite()]
    assert model.scorer != "predictor" or ((finite >= 0) & (finite <= 1)).all()
    for stage, kept in enumerate(trace.kept):  # the best of those that came in
        best = trace.scores[:, stage].clone()
        if model.reducer == "merge" and stage > 0:  # one patch of each token
            best[trace.groups[:, stage - 1] != torch.arange(best.shape[1])] = torch.nan
        best = best.nan_to_num(-1).topk(kept.shape[1]).indices
        assert torch.equal(best.sort().values, kept.sort().values)
    is_left = trace.groups[0, -1].flatten() < 0
    assert is_left.any() != (model.reducer == "merge")

    shape = pictures.sheet_of_strips(images, trace, pictures.has_fast_path(model)).shape
    assert shape == pictures.sheet_of_heat_maps(images, trace).shape
    panel = pictures.stage_panel(images[0], trace.groups[0, -1], trace.grid, pictures.has_fast_path(model))
    left = panel[:, pictures.spread_patches(is_left.unflatten(0, trace.grid), panel)]
    if pictures.has_fast_path(model):
        assert (left == left[:1]).all() and (left < 255).all()
    else:
        assert (left == 255).all()


def test_tensorboard_reads_back_what_was_drawn(tmp_path: Path) -> None:
    images = torch.stack([random_image(32, 32), random_image(32, 32).flip(1), random_image(32, 32).flip(2)])
    trace = pictures.prune(tiny_model(), images)
    sheets = {"strips": pictures.sheet_of_strips(images, trace), "scores": pictures.sheet_of_heat_maps(images, trace)}
    with SummaryWriter(tmp_path) as writer:
        for tag, sheet in sheets.items():
            writer.add_image(tag, sheet, global_step=3)
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, sheet in sheets.items():
        (event,) = events.Images(tag)
        # 4 panels of 32 and 5 gaps of 6 in a strip, and a gap around each of the 3 strips
        assert (event.step, event.width, event.height) == (3, 158 + 12, 3 * (44 + 6) + 6)
        read_back = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(read_back, sheet.permute(1, 2, 0).numpy())
    assert torch.equal(sheets["strips"][:, 6:50, 6:164], pictures.strip(images[0], trace.groups[0], GRID))


def test_visualize_a_folder(folder: Path, tmp_path: Path) -> None:
    assert run(folder / "val", "--gif", "--output", tmp_path / "out", "--resume", folder / "run") == 0
    names = ["000_gray", "001_odd", "002_small"]
    expected = {"contact_sheet.png", *(f"{name}_strip.png" for name in names), *(f"{name}.gif" for name in names)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected

    # panels of 32 pixels are enlarged 7 times; below each a line of text, below all of them two
    panel_height = 224 + 6 + 20
    size = (4 * (224 + 6) + 6, panel_height + 2 * 6 + 6 + 2 * 20)
    for name in names:
        assert Image.open(tmp_path / "out" / f"{name}_strip.png").size == size
        with Image.open(tmp_path / "out" / f"{name}.gif") as animation:
            assert (animation.n_frames, animation.size) == (4, (224, panel_height))
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (size[0] + 12, 3 * (size[1] + 6) + 6)

    # a photo is resized and cropped as in ImageNet's validation, though it has the model's size
    model = tiny_model()
    small = Image.open(folder / "val/dogs/small.png")
    crop = visualize.preprocess(small, model.spec, "IMNET")
    assert crop.shape == (3, 32, 32) and not torch.equal(crop, random_image(60, 90)[:, :32, :32])
    assert torch.equal(visualize.preprocess(small, model.spec, "CIFAR"), random_image(60, 90)[:, :32, :32])
    groups = pictures.prune(model, crop[None]).groups[0]
    strip = torch.from_numpy(np.array(Image.open(tmp_path / "out/002_small_strip.png"))).permute(2, 0, 1)
    for stage, panel in enumerate(pictures.panels(pictures.enlarge(crop, 7), groups, GRID)):
        left = 6 + stage * 230
        assert torch.equal(strip[:, 6:230, left : left + 224], panel)


@pytest.mark.parametrize(("spec", "stages"), [(CONVNEXT, 2), (replace(MERGE, img_size=(32, 48)), 3)])
def test_visualize_other_families_and_sizes(spec: ModelSpec, stages: int, folder: Path, tmp_path: Path) -> None:
    save_run(tiny_model(spec), tmp_path / "run.pth")
    assert run(folder / "val/cats/odd.png", "--resume", tmp_path / "run.pth", "--output", tmp_path / "out") == 0
    strip = Image.open(tmp_path / "out/odd_strip.png")
    width = 48 * 5 if spec.reducer == "merge" else 64 * 4  # the factor that comes nearest to 224 pixels
    assert strip.width == (stages + 1) * (width + 6) + 6


def test_visualize_shapes_and_all_stages_of_a_saved_model(folder: Path, tmp_path: Path) -> None:
    spec = replace(MERGE, sizes=SIZES | {"depth": 6}, pruning_loc=(1, 2, 3, 4, 5), base_rate=0.8)
    save_pretrained(tiny_model(spec), tmp_path / "fast")
    command = ["SHAPES", "--count", 2, "--resume", tmp_path / "fast", "--output", tmp_path / "out"]
    for options, panels in ([], 4), (["--all-stages"], 6):
        assert run(*command, *options) == 0
        names = [f"00{i}_{Shapes.classes[i].replace(' ', '_')}_strip.png" for i in (0, 1)]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "contact_sheet.png"}
        assert Image.open(tmp_path / "out" / names[0]).width == panels * (224 + 6) + 6


def test_visualize_dense_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A bare file without a description, made dynamic by flags."""
    torch.save(build_model(replace(SPEC, dense=True)).state_dict(), tmp_path / "dense.pth")
    flags = "--arch deit_tiny --input-size 32 --patch-size 8 --embed-dim 32 --depth 4 --num-heads 2 --pruning-loc 1 2"
    flags = [*flags.split(), "--scorer", "attention", "--reducer", "merge", "--output", tmp_path / "out"]
    assert run(folder / "val/cats/odd.png", "--pretrained", tmp_path / "dense.pth", *flags) == 0
    assert Image.open(tmp_path / "out/odd_strip.png").width == 3 * 230 + 6


def test_caption_gives_both_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(replace(SPEC, num_classes=5))
    dense = build_model(replace(model.spec, dense=True)).eval()
    dense.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("score_predictor.")})
    image = random_image(32, 32)
    normalised = BatchTransform(torch.device("cpu"), model.spec.preprocessing.mean, model.spec.preprocessing.std)
    with torch.no_grad():
        logits = {"all tokens": dense(normalised(image[None])), "dynamic": model(normalised(image[None]))}
    probabilities = {what: values.softmax(1)[0] for what, values in logits.items()}
    assert probabilities["all tokens"].max() != probabilities["dynamic"].max()

    texts = []
    monkeypatch.setattr(pictures, "caption", lambda picture, lines, **_: texts.append(lines) or picture)
    names = ["ant", "bee", "cat", "dog", "eel"]
    visualize.draw(model, image, names, trained=True)
    *panels, lines = texts
    assert panels == [["input"], *([f"before block {i}: {kept} of 16 tokens"] for i, kept in enumerate(KEPT, 1))]
    assert lines == [f"{what}: {names[p.argmax()]}, {p.max():.1%}" for what, p in probabilities.items()]
    visualize.draw(model, image, names, trained=False)
    assert texts[-1][1].startswith("dynamic, untrained: ")


def test_embeddings_are_compared_by_their_cosine() -> None:
    (line,) = visualize.answers(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), [], trained=True)
    assert line == "dynamic: embedding with cosine 0.600 to that of all tokens"


@pytest.mark.parametrize(
    ("spec", "caption", "label"),
    [
        (replace(MERGE, place="inside"), "attention + merge, inside blocks 1, 2, 3", "inside block 1: 9 of 16 tokens"),
        (CONVNEXT, "predictor + fast path, before blocks 1, 2", "before block 1: 8 of 16 locations"),
    ],
)
def test_captions_say_where_stages_are(spec: ModelSpec, caption: str, label: str) -> None:
    model, size = tiny_model(spec), spec.img_size
    trace = pictures.prune(model, random_image(size, size)[None])
    assert pictures.stage_lines(model, trace)[0] == caption
    assert visualize.stage_labels(model, trace)[0] == label


def test_class_names(folder: Path) -> None:
    data = DataOptions("IMNET", str(folder))
    assert visualize.class_names(SPEC, data) == ["cats", "dogs"]
    assert visualize.class_names(replace(SPEC, class_names=("ant", "bee")), data) == ["ant", "bee"]
    assert visualize.class_names(replace(SPEC, class_names=("n02086240", "bee")), data) == ["Shih-Tzu", "bee"]
    assert visualize.class_names(SPEC, replace(data, data_path=str(folder / "moved"))) == ["class 0", "class 1"]
    assert visualize.class_names(replace(SPEC, num_classes=1000), data)[:2] == ["tench", "goldfish"]
    shapes = replace(SPEC, num_classes=len(Shapes.classes))
    assert list(visualize.class_names(shapes, DataOptions("SHAPES"))) == list(Shapes.classes)


def test_the_model_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest run in a user's logs/ is not the one meant, and may not know photos."""
    monkeypatch.chdir(tmp_path)
    save_run(tiny_model(), tmp_path / "logs" / "new" / "checkpoint_best.pth")
    photo = folder / "val/cats/odd.png"
    assert run(photo) == 2
    assert run(folder / "run", photo) == 0
    assert Image.open("logs/pictures/odd_strip.png").width == 4 * 230 + 6


def test_damaged_weights_are_no_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model()
    model.head.weight.data.fill_(3e38)  # a number, but what it gives is none
    save_run(model, tmp_path / "run.pth")
    assert run(tmp_path / "run.pth", folder / "val/cats/odd.png", "--output", tmp_path / "out") == 2
    assert "not finite" in capsys.readouterr().err


def test_a_picture_never_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Scores that are NaN everywhere, and a scorer that fails: the log and the other values are there."""
    val_set = AugmentedDataset(SmallImages(), eval_transform(32, Preprocessing(), "CIFAR"), train=False)
    output = Output(str(tmp_path), Progress(), val_set)
    model = tiny_model()
    for parameter in model.score_predictor.parameters():
        parameter.data.fill_(torch.nan)
    history = [{"epoch": 0, "train/loss": 1.0}]
    output.write_epoch(history, 1.0, model)
    model.trace = lambda images: 1 / 0
    history.append({"epoch": 1, "train/loss": 0.5})
    output.write_epoch(history, 1.0, model)
    output.close()
    assert [line for line in capsys.readouterr().err.splitlines() if "epoch 1" in line] == [
        "warning: no pictures of epoch 1 (ZeroDivisionError: division by zero)"
    ]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0, 0.5]


class SmallImages(torch.utils.data.Dataset):
    classes = ("ant", "bee")

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(random_image(32, 32).permute(1, 2, 0).numpy()), 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["photo.png"], "which model? give it before the image: visualize MODEL photo.png"),
        (["{run}", "photo.png", "--resume", "{run}"], "both name the weights; give one of them"),
        (["missing.pth", "photo.png"], "missing.pth"),
        (["photo.png", "--resume", "missing.pth"], "no such file: missing.pth"),
        (["photo.png", "--resume", "empty"], "no checkpoint_best.pth, checkpoint_last.pth or config.json in empty"),
        (["photo.png", "--resume", "photo.png"], "photo.png is not a checkpoint"),
        (["photo.png", "--pretrained", "bare.pth"], "bare.pth does not name its architecture; add --arch"),
        (["photo.png", "--pretrained", "bare.pth", "--resume", "{run}"], "give one of them"),
        (["photo.png", "--resume", "{run}", "--dense"], "a dense model keeps all its tokens"),
        (["missing.png", "--resume", "{run}"], "no image, and no folder of images: missing.png"),
        (["empty", "--resume", "{run}"], "no image, and no folder of images: empty"),
        (["bare.pth", "--resume", "{run}"], "cannot read image bare.pth"),
        (["photo.png", "--resume", "{run}", "--base-rate", "1.5"], "above 0 and at most 1"),
        (["photo.png", "--resume", "{run}", "--count", "0"], "argument --count: must be positive"),
        (["photo.png", "--resume", "{run}", "--output", "bare.pth"], "File exists: 'bare.pth'"),
    ],
)
def test_user_errors_are_one_line(
    args: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("photo.png")
    Path("empty").mkdir()
    torch.save({"weight": torch.zeros(1)}, "bare.pth")
    assert run(*(word.format(run=folder / "run") for word in args)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: this PyTorch")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


def test_feature_colours_show_what_varies() -> None:
    """The same directions for another model's features, and similar patches look similar."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.eye(6)[:3] * torch.tensor([30.0, 20.0, 10.0])[:, None]
    shares = torch.rand(400, 3, generator=generator)
    features = shares @ patterns + 0.1 * torch.randn(400, 6, generator=generator) + 5
    colours, directions = pictures.feature_colours(features)
    assert colours.shape == (400, 3) and colours.dtype == torch.uint8
    assert directions.abs().argmax(dim=1).tolist() == [0, 1, 2]
    for component in range(3):
        together = torch.corrcoef(torch.stack([shares[:, component], colours[:, component].float()]))[0, 1]
        assert together.abs() > 0.98
    again, same = pictures.feature_colours(features + 3, directions)
    assert torch.equal(again, colours) and same is directions
    picture = pictures.feature_map(colours[:16], GRID, torch.zeros(3, 32, 32))
    assert picture.shape == (3, 32, 32)
    assert picture[:, 0, 31].tolist() == colours[3].tolist() and picture[:, 31, 0].tolist() == colours[12].tolist()
    models = {"dense": features[:16], "fast": features[16:32]}
    strip = pictures.feature_strip(torch.zeros(3, 32, 32, dtype=torch.uint8), models, GRID)
    assert strip.shape[2] == 3 * (32 + pictures.GAP) + pictures.GAP and strip.shape[1] > 32 + 2 * pictures.GAP
    shown = strip[:, pictures.GAP : pictures.GAP + 32, -32 - pictures.GAP : -pictures.GAP]
    assert torch.equal(
        shown,
        pictures.feature_map(
            pictures.feature_colours(features[16:32], pictures.feature_colours(features[:16])[1])[0],
            GRID,
            torch.zeros(3, 32, 32),
        ),
    )
