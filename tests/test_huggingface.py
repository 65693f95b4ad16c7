"""Dynamic models of transformers, small and random: they answer as the dense ones do, with fewer tokens inside."""

import copy
import json
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from dynamicvit.errors import UserError
from dynamicvit.image_files import open_image
from dynamicvit.models import (
    SCORERS,
    CheckpointError,
    Look,
    Scorer,
    Scores,
    Teacher,
    describe,
    from_pretrained,
    make_dynamic,
    save_pretrained,
)
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.stages import FOR_FEATURES
from dynamicvit.models.twins import dense_twin
from dynamicvit.tools import predict, runtimes, speedup
from dynamicvit.tools.accelerate import accelerate
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

STAGES = (1, 3)
HALF = (0.75, 0.5)
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}  # 16 patches
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def build(model: str, config: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**SIZES, **changes)).eval()


def build_with_text(model: str, config: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, config)(vision_config=SIZES, text_config=TEXT, num_labels=5)
    return getattr(transformers, model)(config).eval()


vit = partial(build, "ViTForImageClassification", "ViTConfig", num_labels=5)
dinov2 = partial(build, "Dinov2Model", "Dinov2Config")
clip = partial(build, "CLIPVisionModel", "CLIPVisionConfig")

KINDS: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(build, "ViTModel", "ViTConfig"),
    "vit_classifier": vit,
    "deit_classifier": partial(build, "DeiTForImageClassification", "DeiTConfig", num_labels=5),
    "deit_distilled": partial(build, "DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5),
    "dinov2": dinov2,
    "dinov2_backbone": partial(build, "Dinov2Backbone", "Dinov2Config", out_features=["stage2", "stage4"]),
    "dinov2_classifier": partial(build, "Dinov2ForImageClassification", "Dinov2Config", num_labels=5),
    "dinov2_registers": partial(
        build,
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        num_labels=5,
        num_register_tokens=3,
    ),
    "siglip": partial(build, "SiglipVisionModel", "SiglipVisionConfig"),
    "siglip_classifier": partial(build_with_text, "SiglipForImageClassification", "SiglipConfig"),
    "clip": clip,
    "clip_projection": partial(build, "CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16),
    "clip_classifier": partial(build_with_text, "CLIPForImageClassification", "CLIPConfig"),
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tensors(output) -> dict[str, Tensor]:
    """All outputs of a model, by name."""
    flat = {}
    for name, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        flat |= {f"{name}{i}": entry for i, entry in enumerate(values)}
    return flat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scorer", ["distinct", "predictor"])
@torch.no_grad()
def test_with_all_tokens_it_is_the_dense_model_and_with_half_it_answers_in_its_shapes(kind, scorer, images) -> None:
    dense = KINDS[kind]()
    model = make_dynamic(copy.deepcopy(dense), STAGES, (1.0, 1.0), scorer, "merge")
    expected, found = dense(images, output_hidden_states=True), model(images, output_hidden_states=True)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert tensors(found).keys() == tensors(expected).keys()
    for name, value in tensors(expected).items():
        torch.testing.assert_close(tensors(found)[name], value, atol=1e-5, rtol=1e-4)

    model.set_keep_rates(HALF)
    short = model(images, output_hidden_states=True)
    for name, value in tensors(expected).items():
        assert tensors(short)[name].shape == value.shape
        assert tensors(short)[name].isfinite().all()
    differs = [name for name, value in tensors(expected).items() if not torch.equal(tensors(short)[name], value)]
    assert differs
    plain = model(images)
    assert plain.keys() <= short.keys()
    for name, value in tensors(plain).items():
        torch.testing.assert_close(value, tensors(short)[name])


@pytest.mark.parametrize("kind", ["vit_classifier", "dinov2_registers", "siglip", "clip_projection"])
def test_speedup_is_in_multiply_adds(kind: str) -> None:
    dense = KINDS[kind]()
    cost = count_gflops(dense, 32)
    model = make_dynamic(dense, speedup=1.25)
    assert model is dense
    assert cost / 1.4 < count_gflops(model, 32) <= cost / 1.25


class These(Scorer):
    """Keeps the patches with these numbers."""

    name = "these"

    def __init__(self, *best: int) -> None:
        self.best = best

    def __call__(self, look: Look, module: None) -> Scores:
        scores = torch.zeros(look.tokens.shape[:2])
        scores[:, self.best] = 1.0
        return Scores(scores)


@pytest.fixture(autouse=True)
def known_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SCORERS, "these", raising=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_merged_token_counts_as_often_as_the_patches_in_it(implementation: str, images: Tensor) -> None:
    """Groups of three, four and one equal patches, merged, tell the class token what they tell it unmerged."""
    dense = vit()
    dense.set_attn_implementation(implementation)
    dense.vit.embeddings.position_embeddings.zero_()
    rows = torch.cat([images[:, :, :, :8]] * 4, dim=3)
    rows[:, :, :8, 8:16] = images[:, :, :8, 8:16]
    scorer = These(0, 1, 4, 8, 12)
    model = make_dynamic(copy.deepcopy(dense), (1,), (5 / 16,), scorer, "merge")
    torch.testing.assert_close(model(rows).logits, dense(rows).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(make_dynamic(dense, (1,), (5 / 16,), scorer, "drop")(rows).logits, model(rows).logits)


@torch.no_grad()
def test_equal_patches_get_equal_features_back(images: Tensor) -> None:
    dense = dinov2()
    dense.embeddings.position_embeddings.zero_()
    doubled = torch.cat([images[:, :, :, :16]] * 2, dim=3)
    model = make_dynamic(copy.deepcopy(dense), (2,), (0.5,), These(0, 1, 4, 5, 8, 9, 12, 13), "merge")
    found, expected = model(doubled).last_hidden_state, dense(doubled).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model.restore = "none"
    assert model(doubled).last_hidden_state.shape == (2, 9, 32)


@pytest.mark.parametrize(("scorer", "reducer"), [("predictor", "drop"), ("predictor", "merge"), ("distinct", "merge")])
def test_gradients_reach_backbone_and_predictors(scorer: str, reducer: str, images: Tensor) -> None:
    model = make_dynamic(vit(), STAGES, HALF, scorer, reducer).train()
    model(images, labels=torch.tensor([0, 3])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key's bias moves all attention alike
    assert [name for name in without if "key" not in name and "k_proj" not in name] == []


def test_distilled_training_gives_what_the_losses_need(images: Tensor) -> None:
    dense = vit()
    logits, tokens = Teacher(copy.deepcopy(dense))(images)
    torch.testing.assert_close(logits, dense(images).logits)
    torch.testing.assert_close(tokens, dense.vit(images).last_hidden_state[:, 1:])
    for reducer, decisions in (("drop", 2), ("merge", 0)):
        model = make_dynamic(copy.deepcopy(dense), STAGES, HALF, "predictor", reducer).train()
        model.set_distilled_training(True)
        ours = model(images)
        assert ours[0].shape == logits.shape and ours[1].shape == tokens.shape
        assert ours[2].shape == (2, 16) and len(ours[3]) == decisions
        assert model.eval()(images).logits.shape == logits.shape


@pytest.mark.parametrize("kind", ["vit_classifier", "dinov2_registers", "siglip", "clip_projection", "clip_classifier"])
@pytest.mark.parametrize("scorer", ["distinct", "predictor"])
@torch.no_grad()
def test_a_saved_model_comes_back(kind: str, scorer: str, tmp_path: Path, images: Tensor) -> None:
    model = make_dynamic(KINDS[kind](), STAGES, (1.0, 1.0), scorer, "merge")
    model.set_keep_rates(HALF)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [model.backbone_class.__name__] and config["dynamicvit"]["keep_rates"] == [
        0.75,
        0.5,
    ]
    assert "dynamicvit_" not in json.dumps(config)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(images)[0], model(images)[0])
    dense = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path)
    assert torch.equal(dense(images)[0], KINDS[kind]()(images)[0])


@torch.no_grad()
def test_our_save_keeps_class_names_and_notes(tmp_path: Path) -> None:
    save_pretrained(make_dynamic(vit(), STAGES, HALF, "distinct", "merge"), tmp_path, class_names=list("abcde"), kl=0.1)
    assert from_pretrained(tmp_path).class_names == ("a", "b", "c", "d", "e")
    assert json.loads((tmp_path / "config.json").read_text())["dynamicvit"]["notes"] == {"kl": 0.1}


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="make_dynamic"):
        from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architectures": ["SwinModel"]}, "SwinModel; these can be"),
        ({"architectures": ["pipeline"]}, "pipeline; these can be"),
        ({"dynamicvit": {"pruning_loc": [1]}}, "no keep_rates"),
        ({"dynamicvit": dict(pruning_loc=[9], keep_rates=[1], scorer="random", reducer="drop", place="before")}, "9"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message) as error:
            from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_pickle_and_deepcopy(images: Tensor) -> None:
    model = make_dynamic(vit(), STAGES, HALF, "predictor", "merge")
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        model.set_keep_rates(HALF)
        assert torch.equal(copied(images).logits, model(images).logits)
        model.set_keep_rates((0.5, 0.25))
        assert copied.keep_rates == HALF and copied.tokens_kept(16) == [12, 8]
        assert not torch.equal(copied(images).logits, model(images).logits)


@torch.no_grad()
def test_description_and_trace(images: Tensor, tmp_path: Path) -> None:
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    processor |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    dense = vit()
    dense.config.name_or_path = str(tmp_path)
    assert (describe(dense).num_classes, describe(dense).img_size, describe(dense).dense) == (5, 32, True)
    model = make_dynamic(dense, STAGES, HALF, "distinct", "merge")
    assert model.data_config == {
        "input_size": (3, 32, 32),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
    }
    spec = describe(model)
    assert (spec.pruning_loc, spec.keep_rates, spec.scorer, spec.num_classes) == (STAGES, HALF, "distinct", 5)
    trace = model.trace(images)
    assert torch.equal(trace.logits, model(images).logits)
    assert [kept.shape for kept in trace.kept] == [(2, 12), (2, 8)] and trace.grid == (4, 4)
    assert (trace.groups >= 0).all()


@torch.no_grad()
def test_nothing_is_left_of_a_pass(images: Tensor) -> None:
    """Neither by an error, nor for others with the same config, nor for other threads."""
    dense = vit()
    expected = dense(images).logits
    twin = type(dense)(dense.config).eval()
    twin.load_state_dict(dense.state_dict())
    model = make_dynamic(dense, STAGES, HALF, "distinct", "merge")
    half = model(images).logits
    assert torch.equal(twin(images).logits, expected)
    fails = model.vit.layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images)
    fails.remove()
    layer = next(part for part in model.modules() if type(part).__name__ == "ViTLayer")
    layer(torch.randn(2, 5, 32))  # no bias of 13 tokens
    assert torch.equal(model(images).logits, half)
    answers: dict[int, Tensor] = {}

    def call(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                answers[number] = model(images[:, :, :32]).logits if number else twin(images).logits

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(answers[0], expected)
    assert torch.equal(answers[1], half) and torch.equal(answers[2], half)


@torch.no_grad()
def test_inner_model_and_other_attention(images: Tensor) -> None:
    """The tower called by itself gives all patches; an attention function that is chosen later keeps the bias."""
    model = make_dynamic(vit(), STAGES, HALF, "distinct", "merge")
    assert model.vit(images).last_hidden_state.shape == (2, 17, 32)
    before = model(images).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(images).logits, before, atol=1e-5, rtol=1e-4)


# --- accelerate

PROCESSOR_TEXT = json.dumps(
    {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
    }
)
QUICK = {"base_rate": 0.7, "steps": 2, "batch_size": 8, "num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_images(folder := tmp_path_factory.mktemp("photos") / "flat", 60, size=(40, 40))
    return folder


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup, "SECONDS", 0)
    monkeypatch.setattr(speedup, "MIN_ROUNDS", 1)


@torch.no_grad()
def strong(kind: str) -> nn.Module:
    """With weights far from 0, so that answers differ."""
    dense = KINDS[kind]()
    for parameter in dense.parameters():
        parameter.mul_(20 if parameter.ndim > 1 else 1)
    return dense


def test_accelerate_a_saved_folder_and_use_what_comes_out(
    tmp_path: Path, photos: Path, untimed: None, images: Tensor, capsys
) -> None:
    dense = strong("vit_classifier")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text(PROCESSOR_TEXT)
    fast, report = accelerate(tmp_path / "dense", photos, output=tmp_path / "fast", class_names=list("abcde"), **QUICK)
    assert type(fast).__name__ == "ViTForImageClassification" and fast.pruning_loc
    assert list(report.rows) == ["dense", "merged", "fine-tuned"] and report.notes == []
    assert report.rows["merged"]["kl"] > 0 and report.rows["dense"]["gflops"] > report.rows["merged"]["gflops"]
    assert (tmp_path / "fast" / "preprocessor_config.json").read_text() == PROCESSOR_TEXT
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "model(transform(image)[None]).logits" in card and "accelerated: kl" in card

    loaded = from_pretrained(tmp_path / "fast")
    assert torch.equal(loaded(images).logits, fast(images).logits)
    assert loaded.spec == fast.spec and loaded.class_names == tuple("abcde")
    assert loaded.spec.preprocessing.mean == (0.1, 0.2, 0.3)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path / "fast")
    assert not torch.equal(plain.classifier.weight, dense.classifier.weight)  # fine-tuned

    capsys.readouterr()
    predict.command([str(tmp_path / "fast"), str(photos / "0.jpg")])
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]} == set("abcde")

    again, _ = accelerate(tmp_path / "fast", photos, **QUICK | {"steps": 0})  # its backbone
    assert torch.equal(again.classifier.weight, plain.classifier.weight)


def test_accelerate_a_model_object_goes_on_where_it_was(tmp_path: Path, photos: Path, untimed) -> None:
    dense = strong("clip_projection")
    before = copy.deepcopy(dense.state_dict())
    how = QUICK | {"mean": (0.5, 0.5, 0.5)}
    first, report = accelerate(dense, photos, output=tmp_path / "fast", **how)
    assert "without a readable preprocessor_config.json" in report.notes[0] and "cosine" in report.rows["merged"]
    (tmp_path / "fast" / "model.safetensors").unlink()
    second, _ = accelerate(dense, photos, output=tmp_path / "fast", **how)  # from its last checkpoint
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert from_pretrained(tmp_path / "fast").spec == second.spec
    assert accelerate(first, photos, **QUICK | {"steps": 0})[1].rows["merged"]["cosine"] < 1  # a dynamic one's backbone


@torch.no_grad()
@pytest.mark.parametrize("said", [{"height": 32, "width": 32}, 32, None], ids=["two sides", "one side", "nothing"])
def test_photos_are_squashed_where_the_processor_squashes_them(said: dict | int | None, tmp_path: Path) -> None:
    size = {"height": 32, "width": 32}
    vit().save_pretrained(tmp_path)
    if said is not None:
        processor = {"feature_extractor_type": "ViTFeatureExtractor", "size": said}
        processor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    dense = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    save_pretrained(make_dynamic(dense, STAGES, HALF, "distinct", "merge"), tmp_path / "saved")
    model = from_pretrained(tmp_path / "saved")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    theirs = transformers.ViTImageProcessor(size=size, resample=2)(photo, return_tensors="pt")["pixel_values"][0]
    ours = create_transform(**model.data_config)(photo)
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)  # they round after resizing


def test_preprocessing_given_by_hand_is_saved_for_transformers_too(tmp_path: Path, photos: Path, untimed) -> None:
    vit().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text(PROCESSOR_TEXT)
    how = {"mean": (0.3, 0.4, 0.5), "crop_pct": 0.5, "steps": 0}
    accelerate(tmp_path / "dense", photos, output=tmp_path / "fast", **QUICK | how)
    loaded = from_pretrained(tmp_path / "fast")
    assert loaded.spec.preprocessing.mean == (0.3, 0.4, 0.5) and loaded.spec.preprocessing.crop_pct == 0.5
    photo = open_image(photos / "0.jpg")
    ours = create_transform(**loaded.data_config)(photo)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "fast", backend="pil")
    theirs = processor(photo, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["vit_classifier", "dinov2"])
def test_accelerate_for_features(kind: str, tmp_path: Path, photos: Path, untimed: None, images: Tensor) -> None:
    dense = strong(kind)
    how = QUICK | {"purpose": "features", "base_rate": None, "flops_speedup": 1.1, "steps": 40}
    fast, report = accelerate(dense, photos, output=tmp_path / "fast", **how)
    assert fast.scorer.name == FOR_FEATURES.scorer and report.rows["merged"]["worst"] < 1
    assert report.rows["fine-tuned"]["cosine"] > report.rows["merged"]["cosine"]
    loaded = from_pretrained(tmp_path / "fast")
    tower = getattr(loaded, "vit", loaded)
    with torch.no_grad():
        features = loaded.forward_features(images)
        assert features.shape == (2, 17, 32)
        assert torch.equal(features, tower(images).last_hidden_state)
        cosine = nn.functional.cosine_similarity(features, getattr(dense, "vit", dense)(images)[0], dim=-1)
    assert 0.5 < cosine.mean() < 1
    assert "model.forward_features(" in (tmp_path / "fast" / "README.md").read_text()


@torch.no_grad()
def test_exported_it_gives_its_logits_and_its_twin_the_dense_ones(images: Tensor) -> None:
    dense = strong("vit_classifier")
    model = make_dynamic(copy.deepcopy(dense), STAGES, HALF, "predictor", "merge")
    program = runtimes.trace(runtimes.exportable(model, half=False), model.spec, batch=None).module()
    torch.testing.assert_close(program(images), model(images).logits)
    assert not torch.allclose(model(images).logits, dense(images).logits, atol=1e-3)
    torch.testing.assert_close(dense_twin(model)(images).logits, dense(images).logits)


def test_accelerate_refuses_in_one_line(tmp_path: Path) -> None:
    text = {"vision_config": SIZES, "text_config": TEXT}
    both = transformers.CLIPModel(transformers.CLIPConfig(**text))
    with pytest.raises(UserError, match="reads text, too"):
        accelerate(both, tmp_path)
    with pytest.raises(UserError, match="only with a model's name"):
        accelerate(vit(), tmp_path, input_size=64)


def test_wrong_requests_are_refused_in_one_line(images: Tensor) -> None:
    by_hand = partial(make_dynamic, scorer="distinct", reducer="merge")
    model = by_hand(vit(), STAGES, HALF)
    text = {"vision_config": SIZES, "text_config": TEXT}
    both = transformers.CLIPModel(transformers.CLIPConfig(**text))
    checkpointing = by_hand(vit(), STAGES, HALF).train()
    checkpointing.gradient_checkpointing_enable()
    for request, message in (
        (lambda: by_hand(vit(), (0, 2), HALF), "1..3"),
        (lambda: by_hand(vit(), (1, 4), HALF), "1..3"),
        (lambda: by_hand(vit(), STAGES, (0.5, 0.7)), "cannot grow"),
        (lambda: by_hand(vit(), STAGES, HALF, place="inside"), "before"),
        (lambda: by_hand(model, STAGES, HALF), "already dynamic"),
        (lambda: by_hand(both, STAGES, HALF), "vision_model"),
        (lambda: make_dynamic(vit(), speedup=20), "too few tokens"),
        (lambda: model(images, output_attentions=True), "output_attentions"),
        (lambda: checkpointing(images), "gradient_checkpointing_disable"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            request()
        assert "\n" not in str(error.value)
    assert model(images).logits.shape == (2, 5)
