"""What learns how fast, from which images and labels: against the formulas of the paper and of DeiT."""

import copy
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.multiprocessing as mp
from dynamicvit.datasets import Augmentation
from dynamicvit.engine import accumulate_gradients, unwrap, update_weights
from dynamicvit.models import ModelSpec, Teacher, create_model, make_dynamic
from dynamicvit.optim import (
    BACKBONE,
    PREDICTOR,
    Trainer,
    dense_rates,
    dynamic_rates,
    is_always_frozen,
    learning_rates,
    param_groups,
    set_rates,
)
from dynamicvit.optim import build_trainer as build_trainer_of
from dynamicvit.recipe import Entry, Expected, Recipe, build_recipe
from dynamicvit.runs import start
from torch import Tensor, nn

from dynamicvit import recipe, utils

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS = ("deit_small", "lvvit_s")
# What was published for deit_small: 8 processes with 96 images each.
LR, MIN_LR, EPOCHS, WARMUP = 5e-4 * 96 * 8 / 512, 1e-5, 30, 5


def build(arch: str, dense: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return create_model(arch, dense=dense, pruning_loc=(1, 2), keep_rates=(0.7, 0.5), **TINY)


def build_trainer(arch: str = "deit_small", *flags: str) -> Trainer:
    """As the command line does it, without random erasing."""
    teacher = Teacher(build(arch, dense=True))
    chosen = parse("--distill", "--amp", "off", *flags)
    return build_trainer_of(chosen, build(arch), teacher, torch.device("cpu"), Augmentation(reprob=0), 10)


def parse(*flags: str, spec: ModelSpec = ModelSpec()) -> Recipe:  # noqa: B008
    return start.choose_recipe(start.parse_args(list(flags)), spec)[0]


def rates(epoch: float, *flags: str, dense: bool = False, steps_per_epoch: int = 10) -> dict[str, float]:
    return learning_rates(parse(*flags), dense, steps_per_epoch, epoch)


def random_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, torch.tensor([0, 1, 2, 3])


def step(trainer: Trainer, seed: int = 0) -> None:
    torch.manual_seed(seed)
    accumulate_gradients(trainer, *random_batch(seed), last=True)
    assert update_weights(trainer, []) == 0


# --- Parameter groups


def grouped_names(model: nn.Module, groups: list[dict]) -> dict[tuple[str, float], set[str]]:
    """Names by (group, weight decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {(g["name"], g["weight_decay"]): {names[parameter] for parameter in g["params"]} for g in groups}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_dynamic_model(kind: str) -> None:
    model = build(kind)
    groups = grouped_names(model, param_groups(model, weight_decay=0.05))
    everything = {name for name, _ in model.named_parameters()}
    predictors = {name for name in everything if name.startswith("score_predictor.")}
    matrices = {"patch_embed.proj.weight", "head.weight"}
    matrices |= {f"blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1")}
    matrices |= {f"blocks.{i}.mlp.fc2.weight" for i in range(3)}
    if kind == "lvvit_s":
        matrices |= {"aux_head.weight", *(f"patch_embed.conv{i}.weight" for i in (1, 2, 3))}
    frozen = {"cls_token", "pos_embed"}
    assert groups == {
        (PREDICTOR, 0.05): predictors,
        (BACKBONE, 0.05): matrices,
        (BACKBONE, 0.0): everything - predictors - matrices - frozen,
    }
    assert {"norm.weight", "head.bias", "blocks.0.norm1.weight", "blocks.2.mlp.fc2.bias"} <= groups[BACKBONE, 0.0]
    assert len(predictors) == 2 * 10  # LayerNorm and four Linear, for each of two stages
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("kind", KINDS)
def test_what_sees_all_tokens_does_not_learn_without_labels(kind: str) -> None:
    """The first stage is inside block 1: that block learns, and so does all that follows."""
    model = make_dynamic(build(kind, dense=True), (1, 2), (0.7, 0.5), "distinct", "merge", place="inside")
    names = {parameter: name for name, parameter in model.named_parameters()}
    learning = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    learning |= {name for name in names.values() if name.startswith(("blocks.1.", "blocks.2.", "aux_head."))}
    teacher, chosen = Teacher(build(kind, dense=True)), build_recipe("label-free", distill=True, amp="off")
    trainer = build_trainer_of(chosen, model, teacher, torch.device("cpu"), Augmentation(reprob=0), 10)
    assert {names[p] for group in trainer.optimizer.param_groups for p in group["params"]} == learning
    assert {name for parameter, name in names.items() if parameter.requires_grad} == learning


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_dense_model(kind: str) -> None:
    model = build(kind, dense=True)
    groups = grouped_names(model, param_groups(model, weight_decay=0.05))
    assert set(groups) == {(BACKBONE, 0.05), (BACKBONE, 0.0)}
    assert {"cls_token", "pos_embed", "norm.bias"} <= groups[BACKBONE, 0.0]
    assert "head.weight" in groups[BACKBONE, 0.05]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_optimizer_is_adamw_with_the_published_weight_decay() -> None:
    optimizer = build_trainer().optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (PREDICTOR, 0.05),
        (BACKBONE, 0.05),
        (BACKBONE, 0.0),
    ]


# --- Learning rates


def expected_rates(epoch: int, backbone_scale: float = 0.01) -> dict[str, float]:
    cosine = MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * epoch / EPOCHS))
    return {PREDICTOR: cosine, BACKBONE: 0.0 if epoch < WARMUP else min(backbone_scale * LR, cosine)}


@pytest.mark.parametrize("backbone_scale", [0.01, 0.05])
def test_rates_at_every_epoch(backbone_scale: float) -> None:
    for epoch in range(EPOCHS):
        by_name = dynamic_rates(LR, MIN_LR, epoch, EPOCHS, WARMUP, backbone_scale)
        assert by_name == pytest.approx(expected_rates(epoch, backbone_scale), rel=1e-12)


def test_rates_by_hand() -> None:
    assert pytest.approx(7.5e-4) == LR
    by_epoch = [dynamic_rates(LR, MIN_LR, epoch, EPOCHS, WARMUP, 0.05) for epoch in range(EPOCHS)]
    assert by_epoch[0] == pytest.approx({PREDICTOR: 7.5e-4, BACKBONE: 0})
    assert by_epoch[4][BACKBONE] == 0 and by_epoch[5][BACKBONE] == pytest.approx(3.75e-5)
    assert by_epoch[15][PREDICTOR] == pytest.approx(3.8e-4)  # half-way between 7.5e-4 and 1e-5
    # 1e-5 + 3.7e-4 * (1 + cos 174 degrees), less than 5 % of 7.5e-4
    assert by_epoch[29] == pytest.approx({PREDICTOR: 1.20269e-5, BACKBONE: 1.20269e-5}, rel=1e-5)


def test_published_command_line_has_these_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "get_world_size", lambda: 8)
    flags = ("--arch", "deit_small", "--batch-size", "96", "--epochs", "30", "--distill", "--base_rate", "0.7")
    for epoch in range(EPOCHS):
        assert rates(epoch, *flags) == pytest.approx(expected_rates(epoch), rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 5e-4 * 64 / 512),
        (("--batch-size", "128"), 5e-4 * 128 / 512),
        (("--batch-size", "128", "--update-freq", "4"), 5e-4),
        (("--batch-size", "512", "--lr", "1e-3"), 1e-3),
    ],
)
def test_linear_scaling(flags: tuple[str, ...], expected: float) -> None:
    assert rates(0, *flags)[PREDICTOR] == pytest.approx(expected)


# Processes are forked from one that has done the slow imports.
multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "timm"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def report_rate(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    utils.init_distributed(torch.device("cpu"))
    rate = rates(0, "--batch-size", "64")[PREDICTOR]
    (folder / str(rank)).write_text(str(rate))
    utils.gather(rank)  # so that none leaves while the other still connects
    utils.end_distributed()


def test_linear_scaling_with_processes(tmp_path: Path) -> None:
    mp.start_processes(report_rate, (free_port(), tmp_path), nprocs=2, start_method="forkserver")
    reported = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert reported == pytest.approx([5e-4 * 64 * 2 / 512] * 2)


def test_rates_change_between_epochs_only() -> None:
    within = [dynamic_rates(LR, MIN_LR, 7 + part, EPOCHS, WARMUP, 0.01) for part in (0, 0.25, 0.999)]
    assert within == [pytest.approx(expected_rates(7))] * 3


def test_dense_rates() -> None:
    """Linear warm-up from 1e-5 to 1.1e-4 over 5 epochs, then cosine back; step by step."""

    def rate(epoch: float) -> float:
        return dense_rates(1.1e-4, 1e-5, epoch, 20, 5)[BACKBONE]

    assert [rate(epoch) for epoch in (0, 1, 2.5, 4)] == pytest.approx([1e-5, 3e-5, 6e-5, 9e-5])
    assert rate(10) == pytest.approx(6e-5)  # half of the run is done
    for epoch in (5, 7.25, 15, 19.5):
        assert rate(epoch) == pytest.approx(1e-5 + 0.5 * 1e-4 * (1 + math.cos(math.pi * epoch / 20)))
    assert set(rates(0, "--dense", dense=True)) == {BACKBONE}


@pytest.mark.parametrize(("epoch", "backbone_learns"), [(4, False), (5, True)])
def test_backbone_waits_for_the_predictors(epoch: int, backbone_learns: bool) -> None:
    trainer = build_trainer()
    set_rates(trainer.optimizer, expected_rates(epoch))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    step(trainer)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {"cls_token", "pos_embed"}
    predictors = {name for name in before if name.startswith("score_predictor.")}
    assert moved == (before.keys() - frozen if backbone_learns else predictors)


# --- Images and labels


@pytest.mark.parametrize("kind", KINDS)
def test_student_teacher_and_labels_are_mixed_alike(kind: str) -> None:
    trainer = build_trainer(kind, "--mixup", "8", "--cutmix", "0", "--smoothing", "0.1")
    seen: dict[str, Tensor] = {}
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0].clone()))
    trainer.criterion.teacher.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0].clone()))
    trainer.criterion.base_criterion.register_forward_pre_hook(lambda _, inputs: seen.update(labels=inputs[1]))
    utils.set_seed(1)
    images, labels = random_batch()
    accumulate_gradients(trainer, images, labels, last=True)

    assert torch.equal(seen["student"], seen["teacher"])
    # Labels: 0.9 of the one and of the other image's class in shares of lam, and 0.1 of everything
    other = labels.flip(0)
    lam = (seen["labels"][0, labels[0]].item() - 0.1 / 4) / 0.9
    assert 0.1 < lam < 0.9
    one_hot, other_hot = nn.functional.one_hot(labels, 4), nn.functional.one_hot(other, 4)
    expected = 0.9 * (lam * one_hot + (1 - lam) * other_hot) + 0.1 / 4
    torch.testing.assert_close(seen["labels"], expected)
    # Images: the same shares, of ImageNet's mean and standard deviation
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(seen["student"], lam * normal + (1 - lam) * normal.flip(0), rtol=1e-4, atol=1e-5)


def test_without_mixup_labels_are_smoothed() -> None:
    trainer = build_trainer("deit_small", "--mixup", "0", "--cutmix", "0", "--smoothing", "0.2")
    logits, labels = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([1])
    target = torch.tensor([[0.05, 0.85, 0.05, 0.05]])
    expected = -(target * logits.log_softmax(dim=-1)).sum()
    torch.testing.assert_close(trainer.criterion.base_criterion(logits, labels), expected)


# --- Moving average


@pytest.mark.parametrize("kind", KINDS)
def test_moving_average(kind: str) -> None:
    """ema <- 0.9 ema + 0.1 weights after every step, from the first weights on; BatchNorm's statistics too."""
    trainer = build_trainer(kind, "--model-ema-decay", "0.9")
    model = unwrap(trainer.model)
    set_rates(trainer.optimizer, {PREDICTOR: 1e-2, BACKBONE: 1e-2})
    expected = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    first = dict(expected)
    for seed in range(3):
        step(trainer, seed)
        state = model.state_dict()
        expected = {name: 0.9 * average + 0.1 * state[name] for name, average in expected.items()}
    average = trainer.ema.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, msg=name)
    assert any((value - first[name]).abs().max() > 1e-3 for name, value in expected.items())
    assert not trainer.ema.module.training


def test_moving_average_by_default_is_deits() -> None:
    assert build_trainer().ema.decay == 0.99996
    assert build_trainer("deit_small", "--no-model-ema").ema is None


# --- The journal version's schedule, from its own code: 10 steps an epoch


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--epochs 120 --lr 4e-3 --warmup-epochs 20",
            {1: 2.01005e-05, 100: 0.00201005, 199: 0.004, 200: 0.004, 700: 0.0020005, 1199: 1.00987e-06},
        ),
        (
            "--epochs 30 --lr 1e-3 --warmup-epochs 5",
            {25: 0.000510204, 49: 0.001, 50: 0.001, 175: 0.0005005, 299: 1.03944e-06},
        ),
    ],
)
def test_journal_schedule(flags: str, expected: dict[int, float]) -> None:
    for step_number, lr in expected.items():
        found = rates(step_number / 10, "--recipe", "journal", "--backbone-lr-scale", "0.2", *flags.split())
        assert found[PREDICTOR] == pytest.approx(lr, rel=1e-5)
        assert found[BACKBONE] == pytest.approx(0 if step_number < 50 else 0.2 * lr, rel=1e-5)


@pytest.mark.parametrize(("arch", "counts"), [("swin_t", (17, 33, 65, 108)), ("convnext_t", (20, 50, 59, 123))])
def test_journal_groups(arch: str, counts: tuple[int, ...]) -> None:
    """What is new and the backbone, each with weight decay and without, of the sizes counted in the published code."""
    with torch.device("meta"):
        model = create_model(arch)
    groups = param_groups(model, 0.05, decay_new_biases=False)
    assert tuple(len(group["params"]) for group in groups) == counts
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        (PREDICTOR, 0.05),
        (PREDICTOR, 0.0),
        (BACKBONE, 0.05),
        (BACKBONE, 0.0),
    ]


def test_recipe_follows_from_the_model() -> None:
    assert parse().recipe == "neurips"
    assert parse(spec=ModelSpec("swin_t")).recipe == "journal"
    assert parse(spec=ModelSpec("swin_t")).ratio_weight == 10
    assert parse("--recipe", "journal").ratio_weight == 2  # DeiT's
    merged = parse("--distill", spec=ModelSpec(scorer="attention", reducer="merge"))
    assert merged.recipe == "label-free" and merged.cls_weight == 0
    assert parse("--lr", "1", spec=ModelSpec("convnext_s")).lr == 1


# --- A recipe's values decide, and not its name

MINE = Entry(
    Recipe(
        recipe="mine",
        epochs=4,
        lr=0.125,
        min_lr=0.0,
        warmup_epochs=0.0,
        frozen_epochs=0.25,
        backbone_lr_scale=0.5,
        batch_size=4,
        mixup=0.0,
        cutmix=0.0,
        distill=True,
        cls_weight=0.0,
        schedule="steps",
        lr_images=16,
        decay_new_biases=False,
    ),
    Augmentation(reprob=0.0, aa="none"),
    Expected("none", "a toaster", "0.01", "bread", "measured"),
    for_models_of={"neurips": {"token_weight": 0.25}},
)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.RECIPES, "mine", MINE)


def test_a_fourth_recipe_is_one_entry(mine: None) -> None:
    """It is a flag's choice, --help shows it, and two steps follow its values."""
    assert "mine: none. a toaster" in start.build_parser().format_help()
    chosen = parse("--recipe", "mine", "--amp", "off", "--clip-grad", "3")
    assert chosen == replace(MINE.recipe, amp="off", clip_grad=3.0, token_weight=0.25)
    assert parse("--recipe", "mine", spec=ModelSpec("swin_t")).token_weight == 1
    chosen.check(dense=False, given=())

    teacher = Teacher(build("deit_small", dense=True))
    model = build("deit_small")
    trainer = build_trainer_of(chosen, model, teacher, torch.device("cpu"), MINE.augmentation, 2)
    groups = [(g["name"], g["weight_decay"]) for g in trainer.optimizer.param_groups]
    assert groups == [(PREDICTOR, 0.05), (PREDICTOR, 0.0), (BACKBONE, 0.05), (BACKBONE, 0.0)]
    first, second = trainer.schedule(0.0), trainer.schedule(0.5)
    rate = 0.125 * 4 / 16 * 0.5 * (1 + math.cos(math.pi / 8))  # step 1 of 8
    assert first == pytest.approx({PREDICTOR: 0.125 * 4 / 16, BACKBONE: 0})  # frozen for half of two steps
    assert second == pytest.approx({PREDICTOR: rate, BACKBONE: 0.5 * rate})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    predictors = {name for name in before if name.startswith("score_predictor.")}
    for rates_now, expected in ((first, predictors), (second, before.keys() - {"cls_token", "pos_embed"})):
        set_rates(trainer.optimizer, rates_now)
        step(trainer)
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


def test_models_of_make_dynamic_train_by_a_recipe() -> None:
    """They return logits in a user's own loop; our trainer asks them for what its losses need."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=4)
    teacher = Teacher(copy.deepcopy(backbone))
    model = make_dynamic(backbone, (1, 2), (0.7, 0.5), scorer="distinct", reducer="merge")
    chosen = build_recipe("label-free", distill=True, batch_size=4, amp="off")
    trainer = build_trainer_of(chosen, model, teacher, torch.device("cpu"), Augmentation(reprob=0), 2)
    set_rates(trainer.optimizer, {PREDICTOR: 1e-2, BACKBONE: 1e-2})
    before = model.head.weight.detach().clone()
    step(trainer)
    assert not torch.equal(model.head.weight, before)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize("name", ["neurips", "journal", "label-free"])
def test_names_decide_nothing(name: str) -> None:
    """A recipe under another's name trains as it did."""
    own, renamed = build_recipe(name), build_recipe(name, recipe="other")
    for epoch in (0, 0.3, 1, 6.5):
        for dense in (True, False):
            assert learning_rates(own, dense, 10, epoch) == learning_rates(renamed, dense, 10, epoch)
    groups = [build_trainer_groups(chosen) for chosen in (own, renamed)]
    assert groups[0] == groups[1] and len(groups[0]) == (3 if name == "neurips" else 4)


def build_trainer_groups(chosen: Recipe) -> list[tuple[str, float, int]]:
    trainer = build_trainer_of(chosen, build("deit_small"), None, torch.device("cpu"), Augmentation(), 10)
    return [(g["name"], g["weight_decay"], len(g["params"])) for g in trainer.optimizer.param_groups]


def test_recipes_of_the_papers() -> None:
    """What their code says; the ratio weight of the journal's ViTs is that of the first paper."""
    assert build_recipe("neurips") == Recipe()
    journal = build_recipe("journal")
    assert (journal.epochs, journal.lr, journal.min_lr, journal.ratio_weight) == (120, 4e-3, 1e-6, 10)
    assert (journal.warmup_epochs, journal.epochs_frozen, journal.model_ema_decay) == (20, 5, 0.9999)
    assert parse("--warmup-epochs", "3").epochs_frozen == 3  # the published script knows one number for both
    assert parse("--recipe", "journal", "--warmup-epochs", "3").epochs_frozen == 5
    assert build_recipe("label-free").ratio_weight == 2


@pytest.mark.parametrize(
    ("flags", "dense", "frozen"),
    [
        (("--epochs", "5"), False, True),
        (("--epochs", "6"), False, False),
        (("--epochs", "5"), True, False),
        (("--epochs", "2", "--frozen-epochs", "1.5"), False, True),  # whole epochs are frozen
        (("--recipe", "journal", "--epochs", "5", "--warmup-epochs", "1"), False, True),
        (("--recipe", "journal", "--epochs", "2", "--warmup-epochs", "1", "--frozen-epochs", "1.5"), False, False),
        (("--backbone-lr-scale", "0"), False, True),
    ],
)
def test_backbone_that_never_learns_is_noticed(flags: tuple[str, ...], dense: bool, frozen: bool) -> None:
    chosen = parse(*flags)
    schedule = partial(learning_rates, chosen, dense, 10)
    assert is_always_frozen(schedule, chosen.epochs, 10) == frozen
