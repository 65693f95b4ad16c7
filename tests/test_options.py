"""Flags: what is refused in one line, and whether each one reaches the part that it is for."""

import contextlib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from dynamicvit.datasets import Augmentation
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec, read_checkpoint
from dynamicvit.models.pretrained import known_arch, spec_of
from dynamicvit.options import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    OneLineParser,
    add_flags,
    check_settings,
    setting,
    settings_in,
    take,
)
from dynamicvit.recipe import RECIPES, Recipe
from dynamicvit.runs import start
from dynamicvit.tools import sweep, visualize

BEFORE_SPECS = Path(__file__).parent / "run_before_specs.ckpt"


def chosen(*flags: str, spec: ModelSpec = ModelSpec()) -> tuple[Recipe, Augmentation]:  # noqa: B008
    return start.choose_recipe(start.parse_args(list(flags)), spec)


def message(*flags: str) -> str:
    """Of the error that the flags end in: one line."""
    with pytest.raises(UserError) as caught:
        chosen(*flags)[0].check(dense=False, given=start.parse_args(list(flags)).recipe)
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
    """Not a bare int or float, which would let infinity and not-a-number through."""
    assert not [a.option_strings[0] for a in start.build_parser()._actions if a.type in (int, float)]


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
    flags = start.parse_args(["--base_rate", "0.5", "--data_path=my_data", "--output_dir", "a_b"])
    assert (flags.model.base_rate, flags.data.data_path, flags.run.output_dir) == (0.5, "my_data", "a_b")


def test_flags_that_do_not_go_together() -> None:
    assert "--dense" in message("--dense", "--distill")
    assert "--distill" in message("--cls-weight", "0")
    assert "even" in message("--batch-size", "5")
    for flags in ("--base-rate 0.7 --keep-rates 0.5", "--keep_rates 0.5 --base_rate=0.7"):
        assert "--keep-rates and --base-rate exclude each other" in message(*flags.split())


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        *((f"--{name} 1", "--distill") for name in ("distill-weight", "token-weight", "distill-temperature")),
        ("--dense --distill-weight 1", "--distill"),
        ("--no-model-ema --model-ema-decay 0.9", "--model-ema"),
    ],
)
def test_flags_that_would_do_nothing(flags: str, needed: str) -> None:
    """Those that the user has given; a recipe may have values for what is off."""
    assert f"does nothing without {needed};" in message(*flags.split())


def test_flags_that_do_something() -> None:
    for flags in ("--distill --distill-weight 1 --model-ema-decay 0.9", "--recipe label-free --cls-weight 1"):
        given = start.parse_args(flags.split())
        start.choose_recipe(given, ModelSpec())[0].check(dense=False, given=given.recipe)


@pytest.mark.parametrize("tool", [sweep, visualize])
def test_tools_refuse_the_same(tool: ModuleType) -> None:
    parser = tool.build_parser()
    source = ["image.jpg"] if tool is visualize else []
    parser.parse_args([*source, "--base-rate", "0.7"])
    with pytest.raises(UserError, match="exclude each other"):
        parser.parse_args([*source, "--base-rate", "0.7", "--keep-rates", "0.7"])


def test_exclusion_does_not_mind_defaults() -> None:
    parser = OneLineParser()
    for flag in ("--minutes", "--steps", "--other"):
        parser.add_argument(flag, type=int, default=5)
    parser.exclude("--minutes", "--steps")
    for allowed in ([], ["--minutes=5"], ["--steps", "5", "--other", "5"]):
        assert parser.parse_args(allowed).minutes == 5
    with pytest.raises(UserError, match="--minutes and --steps exclude each other: give one of them"):
        parser.parse_args(["--steps", "5", "--minutes=5"])


@pytest.mark.parametrize("flag", ["--pretrained", "--resume", "--data-path", "--output-dir", "--arch", "--device"])
def test_empty_words(flag: str) -> None:
    """As a shell leaves them where a variable is not set; to a path they would mean the current folder."""
    for words in ([flag, ""], [f"{flag}="], [flag, " "]):
        text = message(*words)
        assert flag in text and "empty" in text


def test_empty_paths_of_every_tool() -> None:
    for parser, words in ((sweep.build_parser(), []), (visualize.build_parser(), ["fast", "photo.jpg"])):
        with pytest.raises(UserError, match="--output: must not be empty"):
            parser.parse_args([*words, "--output", ""])


@pytest.mark.parametrize(
    "flags",
    [
        *("--batch-size 1000000", "--epochs 1000000000", "--num-workers 100000", "--input-size 100000"),
        *("--update-freq 100000000", "--depth 5000", "--embed-dim 100000", "--num-classes 100000000"),
        *("--pruning-loc 99999", "--pruning-loc -1", "--print-freq 100000000000"),
    ],
)
def test_numbers_that_would_take_all_memory(flags: str) -> None:
    flag, value = flags.split()
    text = message(flag, value)
    assert flag in text and value in text and "from" in text


def longer(*flags: str, **spec) -> str:
    """What is printed about a warm-up or frozen epochs, "" if nothing is."""
    recipe, _ = chosen(*flags, "--distill", spec=ModelSpec(**spec))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            recipe.check(spec.get("dense", False), start.parse_args(list(flags)).recipe)
        except UserError as error:
            return str(error)
    return said.getvalue()


def test_epochs_longer_than_the_run() -> None:
    """Values that the model's schedule does not use are not checked."""
    # a recipe's own values are a warning in a short run, the user's are refused
    assert longer("--epochs", "2").startswith("warning: ")
    assert longer("--epochs", "2", "--warmup-epochs", "4").startswith("a time with the backbone frozen of 4 epochs")
    assert "--warmup-epochs" in longer("--epochs", "2") and "frozen of 5 epochs" in longer("--epochs", "2")
    assert "--frozen-epochs" in longer("--epochs", "2", "--frozen-epochs", "3")
    assert not longer("--epochs", "2", "--frozen-epochs", "2")  # the predictors alone learn, which the log says
    assert not longer("--epochs", "2", "--frozen-epochs", "1")  # its warm-up is for dense models
    assert "warm-up of 5 epochs" in longer("--epochs", "4", dense=True)
    assert not longer("--epochs", "5", dense=True)
    journal = ("--recipe", "journal", "--epochs", "10")
    assert "warm-up of 20 epochs" in longer(*journal) and not longer(*journal, "--warmup-epochs", "10")
    assert not longer("--epochs", "1", scorer="distinct", reducer="merge")


# --- A setting is written once


@dataclass(frozen=True)
class Oven:
    """Not a model's settings, to show that the maker of flags knows nothing of models."""

    degrees: int = setting(180, "how hot", ("from 50 to 250", lambda x: 50 <= x <= 250), group="baking")
    minutes: float | None = setting(None, "how long (default: until it is done)", POSITIVE, group="baking")
    racks: tuple[int, ...] | None = setting(None, "which", NOT_NEGATIVE, group="inside")
    span: tuple[float, float] = setting((0.2, 0.8), "from and to", SHARE, group="inside")
    fan: bool = setting(False, "moves the air", group="inside", excludes={"mode": "a mode has its own"})
    mode: str = setting("plain", "what to bake", group="baking", choices=("plain", "pizza"))
    name: str = setting("", "of the recipe", group="baking")
    not_a_flag: int = 3


def bake(*flags: str) -> Oven:
    parser = OneLineParser()
    add_flags(parser, Oven)
    return take(Oven, parser.parse_args(list(flags)))


def test_a_field_is_all_that_a_flag_needs() -> None:
    assert bake() == Oven()
    flags = "--degrees 200 --minutes 1.5 --racks 0 2 --span 0.1 0.3 --mode pizza --name bread"
    assert bake(*flags.split()) == Oven(200, 1.5, (0, 2), (0.1, 0.3), False, "pizza", "bread")
    assert bake("--fan").fan
    wrong = ("--degrees 20", "--degrees 60.5", "--span 0.1", "--mode soup", "--minutes inf", "--fan --mode pizza")
    for flags in (*wrong, "--not-a-flag 1"):
        with pytest.raises(UserError):
            bake(*flags.split())


def test_values_without_a_command_line_have_the_same_ranges() -> None:
    check_settings(Oven())
    for wrong in ({"degrees": 20}, {"span": (0.1, 2.0)}, {"mode": "soup"}, {"minutes": math.nan}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
            check_settings(Oven(**wrong))


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
    assert {*RECIPE_FLAGS, *SWITCHES, "recipe"} == {f.name for f in settings_in(Recipe)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE_FLAGS.items()]
    flags += [f"--{'' if on else 'no-'}{name.replace('_', '-')}" for name, on in SWITCHES.items()]
    recipe, _ = chosen(*flags)
    assert {name: getattr(recipe, name) for name in RECIPE_FLAGS | SWITCHES} == RECIPE_FLAGS | SWITCHES


def test_every_flag_reaches_the_augmentation() -> None:
    flags = "--color-jitter 0.3 --aa none --train-interpolation bilinear --reprob 0.5 --remode const --scale 0.4 0.9"
    _, augmentation = chosen(*flags.split())
    assert (augmentation.color_jitter, augmentation.aa, augmentation.train_interpolation) == (0.3, "none", "bilinear")
    assert (augmentation.reprob, augmentation.remode, augmentation.scale) == (0.5, "const", (0.4, 0.9))
    with pytest.raises(UserError, match="nonsense"):
        chosen("--aa", "nonsense")
    assert chosen("--aa", "None")[1].policy is None


# --- What the model is: the checkpoint says, the flags say otherwise


SAVED = ModelSpec("deit_tiny", 0.5, 10, 64, False, {"patch_size": 8}, (1, 2), (0.5, 0.25), "attention", "merge")


def described(*flags: str, base: ModelSpec | None = SAVED) -> ModelSpec:
    flags = start.parse_args(["--eval", *flags])
    return start.describe(flags.model, base, resumed=True, evaluating=True)


def test_a_model_is_as_its_checkpoint_says() -> None:
    assert described() == SAVED


def test_flags_go_before_the_checkpoint() -> None:
    spec = described("--base-rate", "0.7", "--reducer", "drop", "--embed-dim", "32")
    assert (spec.base_rate, spec.keep_rates, spec.reducer, spec.scorer) == (0.7, None, "drop", "attention")
    assert spec.sizes == {"patch_size": 8, "embed_dim": 32}
    logged = " ".join(SAVED.differences(spec))
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


def test_help_in_groups_with_every_default() -> None:
    parser = start.build_parser()
    actions = parser._actions
    assert all(action.help and action.help.strip(" ().") for action in actions), "a flag without help"
    text = re.sub(r"\s+", " ", parser.format_help())
    assert "(default: 0.0005, journal 0.004, label-free 1e-05)" in text
    assert "(default: --warmup-epochs, journal 5.0, label-free 0.0)" in text
    for heading in ("model:", "data:", "run:", "recipe:", "schedule:", "optimizer:", "loss:", "augmentation:"):
        assert heading in text
    assert text.index("schedule:") < text.index("--warmup-epochs WARMUP_EPOCHS") < text.index("optimizer:")


def test_help_says_what_each_recipe_costs() -> None:
    text = re.sub(r"\s+", " ", start.build_parser().format_help())
    for name, entry in RECIPES.items():
        assert re.sub(r"\s+", " ", f"{name}: {entry.expected}") in text
        assert entry.expected.source in ("published", "measured")
        assert all(getattr(entry.expected, f) for f in ("paper", "hardware", "hours", "result"))
