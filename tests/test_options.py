"""Flags: what is refused in one line, and that each one reaches the part that it is for."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec, read_checkpoint
from dynamicvit.models.pretrained import known_arch, spec_of
from dynamicvit.recipe import Recipe

from dynamicvit import options

BEFORE_SPECS = Path(__file__).parent / "run_before_specs.ckpt"


def message(*flags: str) -> str:
    """Of the error that the flags end in: one line."""
    with pytest.raises(UserError) as caught:
        options.recipe(options.with_recipe(options.parse_args(list(flags)), ModelSpec()))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        *("--lr inf", "--lr 0", "--lr -1", "--min-lr nan", "--weight-decay nan", "--clip-grad nan", "--clip-grad 0"),
        *("--warmup-epochs nan", "--ratio-weight nan", "--distill-weight inf", "--cls-weight -1", "--mixup nan"),
        "--distill-temperature 0",
        *("--mixup-prob 2", "--mixup-prob -1", "--reprob 5", "--model-ema-decay 2", "--model-ema-decay -1"),
        *("--model-ema-decay nan", "--backbone-lr-scale -1", "--drop-path 1", "--smoothing 1", "--color-jitter -1"),
        *("--seed 99999999999999999999", "--seed -1", "--mlp-ratio inf", "--epochs 0", "--epochs 1.5"),
        *("--batch-size 0", "--num-workers -1", "--base-rate 0", "--base-rate 1.2", "--keep-rates 0.5 nan"),
        *("--num-classes 0", "--input-size -3", "--print-freq 0", "--scale 0.5 2"),
    ],
)
def test_numbers_out_of_range(flags: str) -> None:
    flag, value = flags.split()[0], flags.split()[-1]
    text = message(*flags.split())
    assert flag in text and value in text


def test_every_number_has_a_range() -> None:
    """Not a bare int or float, which would let infinity and not-a-number through; block numbers are checked later."""
    bare = [a.option_strings[0] for a in options.build_parser()._actions if a.type in (int, float)]
    assert bare == ["--pruning-loc"]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--ratiow 2", "--ratio-weight"),
        ("--finetune x.pth", "--pretrained"),
        ("--model deit-s", "--arch"),
        ("--nb_classes 10", "--num-classes"),
        ("--lr_scale 0.2", "--backbone-lr-scale"),
    ],
)
def test_names_of_the_published_scripts(flags: str, advice: str) -> None:
    assert advice in message(*flags.split())


def test_no_abbreviations_and_no_other_flags() -> None:
    assert "--epoch" in message("--epoch", "3")
    assert "--lrr" in message("--lrr", "3")


def test_flags_with_underscores() -> None:
    args = options.parse_args(["--base_rate", "0.5", "--data_path=my_data", "--output_dir", "a_b"])
    assert (args.base_rate, args.data_path, args.output_dir) == (0.5, "my_data", "a_b")


def test_flags_that_do_not_go_together() -> None:
    assert "--dense" in message("--dense", "--distill")
    assert "--distill" in message("--cls-weight", "0")
    assert "even" in message("--batch-size", "5")


# A value for every field of the recipe that is not its default, as a flag would give it.
RECIPE_FLAGS = {
    "epochs": 7, "lr": 0.3, "min_lr": 0.2, "backbone_lr_scale": 0.4, "warmup_epochs": 2.5, "frozen_epochs": 1.5,
    "clip_grad": 3.5, "model_ema_decay": 0.9, "cls_weight": 0.7, "ratio_weight": 9.0, "distill_weight": 0.6,
    "token_weight": 0.3, "distill_temperature": 3.0, "mixup": 0.1, "cutmix": 0.2, "batch_size": 10, "update_freq": 3,
    "weight_decay": 0.07,
    "smoothing": 0.3, "mixup_prob": 0.4, "mixup_switch_prob": 0.6, "mixup_mode": "pair", "drop_path": 0.15,
    "amp": "bf16", "seed": 5,
}  # fmt: skip
SWITCHES = {"model_ema": False, "repeated_aug": False, "compile": True, "distill": True}


def test_every_flag_reaches_the_recipe() -> None:
    assert {*RECIPE_FLAGS, *SWITCHES, "recipe"} == set(Recipe.__dataclass_fields__)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE_FLAGS.items()]
    flags += [f"--{'' if on else 'no-'}{name.replace('_', '-')}" for name, on in SWITCHES.items()]
    recipe = options.recipe(options.with_recipe(options.parse_args(flags), ModelSpec()))
    assert {name: getattr(recipe, name) for name in RECIPE_FLAGS | SWITCHES} == RECIPE_FLAGS | SWITCHES


def test_every_flag_reaches_the_augmentation() -> None:
    flags = "--color-jitter 0.3 --aa none --train-interpolation bilinear --reprob 0.5 --remode const --scale 0.4 0.9"
    augmentation = options.augmentation(options.with_recipe(options.parse_args(flags.split()), ModelSpec()))
    assert (augmentation.color_jitter, augmentation.aa, augmentation.train_interpolation) == (0.3, "none", "bilinear")
    assert (augmentation.reprob, augmentation.remode, augmentation.scale) == (0.5, "const", (0.4, 0.9))
    with pytest.raises(UserError, match="nonsense"):
        options.augmentation(augmented("--aa", "nonsense"))
    assert options.augmentation(augmented("--aa", "None")).policy is None


def augmented(*flags: str) -> SimpleNamespace:
    return options.with_recipe(options.parse_args(list(flags)), ModelSpec())


# --- What the model is: the checkpoint says, the flags say otherwise


SAVED = ModelSpec("deit_tiny", 0.5, 10, 64, False, {"patch_size": 8}, (1, 2), (0.5, 0.25), "attention", "merge")


def described(*flags: str, base: ModelSpec | None = SAVED) -> ModelSpec:
    return options.model_spec(options.parse_args(["--eval", *flags]), base, resumed=True)


def test_a_model_is_as_its_checkpoint_says() -> None:
    assert described() == SAVED


def test_flags_go_before_the_checkpoint_and_the_log_says_so(capsys: pytest.CaptureFixture) -> None:
    spec = described("--base-rate", "0.7", "--reducer", "drop", "--embed-dim", "32")
    assert (spec.base_rate, spec.keep_rates, spec.reducer, spec.scorer) == (0.7, None, "drop", "attention")
    assert spec.sizes == {"patch_size": 8, "embed_dim": 32}
    logged = capsys.readouterr().out
    assert "base_rate 0.5 -> 0.7" in logged and "reducer merge -> drop" in logged and "embed_dim" in logged
    assert described("--keep-rates", "0.9", "0.1").keep_rates == (0.9, 0.1)
    assert described("--pruning-loc", "1", "2", "3").keep_rates is None  # two rates do not serve three stages
    assert described("--pruning-loc", "0", "2").keep_rates == SAVED.keep_rates


def test_another_architecture_keeps_nothing_of_the_first_ones_sizes() -> None:
    spec = described("--arch", "lvvit_s")
    assert spec.arch == "lvvit_s" and not spec.sizes and spec.pruning_loc is None


def test_files_from_before_there_were_descriptions() -> None:
    content = read_checkpoint(BEFORE_SPECS)
    assert "spec" not in content
    spec = spec_of(content)
    assert spec == ModelSpec(
        "deit_tiny",
        0.7,
        2,
        32,
        False,
        {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8},
        (1, 2),
        (0.6, 0.3),
    )


def test_published_names() -> None:
    for name, arch in (("deit-s", "deit_small"), ("convnext-t", "convnext_t"), ("lvvit-s", "lvvit_s"), ("vgg", None)):
        assert known_arch(name) == arch


def test_help_names_every_flag_with_its_default() -> None:
    text = re.sub(r"\s+", " ", options.build_parser().format_help())
    assert "(default: 0.0005, journal 0.004, label-free 1e-05)" in text
