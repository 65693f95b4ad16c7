"""Every flag of main_dynamic_vit.py, once: default, range and help; and what the parts take, made from them."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dynamicvit.datasets import DATA_SETS, Augmentation, DataOptions
from dynamicvit.errors import UserError
from dynamicvit.models import (
    ARCHS,
    REDUCERS,
    SCORERS,
    ModelSpec,
    build_model,
    find_weights,
    gives_embeddings,
    load_weights,
    read_checkpoint,
)
from dynamicvit.models.pretrained import num_classes_of
from dynamicvit.models.spec import SIZES
from dynamicvit.recipe import AMP_DTYPES, RECIPES, Recipe
from dynamicvit.runs.checkpoints import BEST, LAST, Place, settings_of, spec_of
from dynamicvit.runs.clocks import SaveClock
from dynamicvit.runs.run import RunOptions
from dynamicvit.utils import log, set_seed
from torch import nn

Number = int | float
T = TypeVar("T")
RUNS = Path("logs")  # where tools look for the newest run

# Ranges of numbers: what a message calls it, and the test. Neither infinity nor not-a-number is in any.
POSITIVE = ("positive", lambda x: x > 0)
NOT_NEGATIVE = ("0 or more", lambda x: x >= 0)
SHARE = ("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE = ("from 0 to below 1", lambda x: 0 <= x < 1)
KEEP_RATE = ("above 0 and at most 1", lambda x: 0 < x <= 1)
SEED = ("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)

# Flags that say what the model is; a checkpoint says it, too.
MODEL_FLAGS = (
    *("arch", "dense", "base_rate", "keep_rates", "pruning_loc", "input_size", "scorer", "reducer"),
    *("merge_streams", *SIZES),
)
# Flags about where and how a run is executed: it may be resumed with other values of these.
# num_classes is among them as the data tells it only later; weights that do not fit are refused anyway.
MAY_CHANGE = {
    *("resume", "eval", "dist_eval", "output_dir", "data_path", "num_classes", "compile"),
    *("device", "num_workers", "print_freq", "save_freq", "skip_bad_images"),
}
# Flags of the published scripts that are gone: what to use instead.
RENAMED = {
    "--ratiow": "use --ratio-weight",
    "--distillw": "use --distill-weight",
    "--finetune": "use --pretrained FILE",
    "--model": "use --arch (deit-s is deit_small, swin-t is swin_t)",
    "--nb-classes": "use --num-classes",
    "--lr-scale": "use --backbone-lr-scale",
    "--eval-data-path": "use --data-path, whose val/ is evaluated",
    "--log-dir": "TensorBoard's events go to --output-dir",
    "--auto-resume": "use --resume auto, which is the default",
    "--start-epoch": "--resume knows the epoch",
    "--use-amp": "use --amp auto",
    "--pin-mem": "memory is pinned where there is a GPU",
    "--no-pin-mem": "memory is pinned where there is a GPU",
    "--save-ckpt-freq": "use --save-freq",
    "--model-ema-eval": "the moving average is evaluated whenever it is kept",
    "--color-jitter-prob": "use --color-jitter",
    "--opt": "the optimizer is AdamW",
    "--sched": "--recipe decides on the schedule",
    "--warmup-lr": "--recipe decides on the schedule",
    "--drop": "published models have no dropout",
    "--layer-decay": "it never worked in the published script",
    "--teacher-model": "the teacher is the model's own dense backbone: --pretrained FILE --distill",
    "--teacher-path": "the teacher is the model's own dense backbone: --pretrained FILE --distill",
    "--distillation-type": "use --distill",
    "--world-size": "start processes with torchrun",
    "--dist-url": "start processes with torchrun",
    "--crop-pct": "the model's own is used",
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no abbreviations, which a new flag could make ambiguous."""

    command: ClassVar[str] = ""  # in place of every prog, where commands go by another name (dynamicvit train)

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog=self.command or prog, formatter_class=DefaultsHelp, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(message)


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none or tell it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def number(kind: type[Number], allowed: tuple[str, Callable[[Number], bool]]) -> Callable[[str], Number]:
    """For argparse's type=: a finite number of the kind that is allowed."""
    what, test = allowed

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not {'a whole' if kind is int else 'a'} number: {text}") from None
        if not math.isfinite(value) or not test(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    return read


def by_recipe(name: str, text: str = "") -> str:
    """Help that ends with the flag's defaults, those of other recipes where they differ."""
    values = {recipe: defaults[name] for recipe, defaults in RECIPES.items()}
    first = values.pop("neurips")
    others = [f"{recipe} {value}" for recipe, value in values.items() if value != first]
    return f"{text} (default: {', '.join([str(first), *others])})".strip()


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="main_dynamic_vit.py", description="Trains and evaluates DynamicViT models.")
    add_model_flags(parser)
    add_data_flags(parser)
    add_run_flags(parser)
    add_recipe_flags(parser)
    add_augmentation_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What the model is, and which weights it starts from."""
    add = parser.add_argument
    add("--arch", help=f"{', '.join(ARCHS)}, or a timm name (default: the checkpoint's, else deit_small)")
    add("--dense", action="store_true", help="the plain backbone, without pruning: a teacher for your own data")
    add(
        "--base-rate",
        type=number(float, KEEP_RATE),
        help="stage s keeps base_rate^s of the original tokens (default: the checkpoint's, else 0.7)",
    )
    add(
        "--keep-rates",
        type=number(float, KEEP_RATE),
        nargs="+",
        help="instead of --base-rate: the share of the original tokens kept after each stage",
    )
    add("--pruning-loc", type=int, nargs="+", help="blocks before which tokens are reduced (default: the arch's)")
    add("--scorer", choices=SCORERS, help="what ranks tokens (default: the checkpoint's, else predictor)")
    add("--reducer", choices=REDUCERS, help="what happens to the rest (default: the checkpoint's, else drop)")
    add(
        "--merge-streams",
        action="store_true",
        help="Swin, ConvNeXt: in training, as in evaluation, a location kept again continues from its true value",
    )
    add("--input-size", type=number(int, POSITIVE), help="pixels (default: the arch's, 224 for the papers')")
    for name, kind in (("patch-size", int), ("embed-dim", int), ("depth", int), ("mlp-ratio", float)):
        add(f"--{name}", type=number(kind, POSITIVE), help="(default: the arch's)")
    add("--num-heads", type=number(int, POSITIVE), nargs="+", help="Swin: for each stage (default: the arch's)")
    add("--depths", type=number(int, POSITIVE), nargs="+", help="Swin, ConvNeXt (default: the arch's)")
    add("--window-size", type=number(int, POSITIVE), help="Swin (default: the arch's)")
    add(
        "--pretrained",
        help="dense weights to start from, a file or folder (default: the arch's in pretrained/, or timm's)",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Which images, and how they are read."""
    add = parser.add_argument
    add(
        "--data-set",
        default="IMNET",
        choices=DATA_SETS,
        help="IMNET is any folder of train/<class> and val/<class>, CIFAR is CIFAR-100",
    )
    add("--data-path", default="", help="the data set's folder")
    add(
        "--num-classes",
        type=number(int, POSITIVE),
        help="classes of the model (default: the data set's; 1000 for folders of WordNet ids)",
    )
    add(
        "--num-workers",
        type=number(int, NOT_NEGATIVE),
        default=min(8, os.cpu_count() or 1),
        help="loader processes for each training process",
    )
    add(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be read, and list them at the end",
    )
    add(
        "--exif",
        action=argparse.BooleanOptionalAction,
        default=DataOptions.exif,
        help="turn photos upright as their EXIF data says (ImageFolder, and so the published runs, do not)",
    )
    add("--dist-eval", action="store_true", help="split the validation images among the processes")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where and how the command runs."""
    add = parser.add_argument
    add("--output-dir", default="", help="where checkpoints, log.txt and TensorBoard events go (default: nowhere)")
    add(
        "--resume",
        default="auto",
        help="checkpoint, or run folder (its last epoch; with --eval, its best); "
        "'auto': the run in --output-dir; 'none': a new run",
    )
    add("--eval", action="store_true", help="evaluate only")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--seed", type=number(int, SEED), default=Recipe.seed)
    add("--print-freq", type=number(int, POSITIVE), default=50, help="steps between progress lines")
    add("--save-freq", default="0", help="steps (500) or minutes (15m) between checkpoints; 0: ends of epochs only")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """How the model learns."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--recipe",
        choices=RECIPES,
        help="sets the defaults below (default: the paper's; label-free for models without predictors)",
    )
    add("--epochs", type=number(int, POSITIVE), help=by_recipe("epochs"))
    add(
        "--batch-size",
        type=number(int, POSITIVE),
        default=Recipe.batch_size,
        help="images for each process and forward pass",
    )
    add(
        "--update-freq",
        type=number(int, POSITIVE),
        default=Recipe.update_freq,
        help="forward passes per optimizer step",
    )
    add("--amp", choices=("auto", *AMP_DTYPES), default=Recipe.amp, help="mixed precision")
    add("--compile", action=flag, default=Recipe.compile, help="torch.compile student and teacher, for validation too")
    add("--lr", type=number(float, POSITIVE), help=by_recipe("lr", "neurips: for 512 images a step, scaled to yours"))
    add("--min-lr", type=number(float, NOT_NEGATIVE), help=by_recipe("min_lr"))
    add(
        "--backbone-lr-scale",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("backbone_lr_scale", "the backbone's share of the learning rate"),
    )
    add(
        "--warmup-epochs",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("warmup_epochs", "epochs of linear warm-up; neurips, dynamic: epochs with the backbone frozen"),
    )
    add(
        "--frozen-epochs",
        type=number(float, NOT_NEGATIVE),
        help="epochs with the backbone frozen (default: neurips --warmup-epochs, journal 5, label-free 0)",
    )
    add("--weight-decay", type=number(float, NOT_NEGATIVE), default=Recipe.weight_decay)
    add("--clip-grad", type=number(float, POSITIVE), help=by_recipe("clip_grad", "largest gradient norm"))
    add(
        "--drop-path",
        type=number(float, BELOW_ONE),
        default=Recipe.drop_path,
        help="stochastic depth at the last block, 0 at the first",
    )
    add("--model-ema", action=flag, default=Recipe.model_ema, help="also keep and evaluate the weights' moving average")
    add("--model-ema-decay", type=number(float, SHARE), help=by_recipe("model_ema_decay"))

    add("--distill", action="store_true", help="learn from the dense backbone")
    add(
        "--cls-weight",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("cls_weight", "weight of the label loss; with 0, no labels are needed"),
    )
    add(
        "--ratio-weight",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("ratio_weight", "weight of the ratio loss (2 for DeiT and LV-ViT)"),
    )
    add(
        "--distill-weight",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("distill_weight", "weight of the distillation losses"),
    )
    add(
        "--token-weight",
        type=number(float, NOT_NEGATIVE),
        help=by_recipe("token_weight", "weight of the token loss within them; the logits' is 1"),
    )
    add(
        "--distill-temperature",
        type=number(float, POSITIVE),
        help=by_recipe("distill_temperature", "that the logits of both models are divided by to be compared"),
    )
    add("--smoothing", type=number(float, BELOW_ONE), default=Recipe.smoothing, help="label smoothing")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """How training images are varied."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--color-jitter", type=number(float, NOT_NEGATIVE), help=by_recipe("color_jitter", "where --aa is none"))
    add("--aa", help=by_recipe("aa", "timm's auto-augment policy, or none"))
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    add(
        "--scale",
        type=number(float, SHARE),
        nargs=2,
        help=by_recipe("scale", "smallest and largest share of an image that is cut out"),
    )
    add(
        "--repeated-aug",
        action=flag,
        help=by_recipe("repeated_aug", "each epoch shows a third of the images, three times each"),
    )
    add("--reprob", type=number(float, SHARE), help=by_recipe("reprob", "probability of random erasing"))
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased pixels become")
    add("--mixup", type=number(float, NOT_NEGATIVE), help=by_recipe("mixup", "alpha; 0 is off"))
    add("--cutmix", type=number(float, NOT_NEGATIVE), help=by_recipe("cutmix", "alpha; 0 is off"))
    add("--mixup-prob", type=number(float, SHARE), default=Recipe.mixup_prob, help="probability of mixing")
    add(
        "--mixup-switch-prob",
        type=number(float, SHARE),
        default=Recipe.mixup_switch_prob,
        help="probability of cutmix rather than mixup, where both are on",
    )
    add("--mixup-mode", default=Recipe.mixup_mode, choices=("batch", "pair", "elem"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError for flags that do not exist, values out of range, and flags that do not go together."""
    words = dashed(sys.argv[1:] if argv is None else argv)
    for word in words:
        name = word.partition("=")[0]
        if name in RENAMED:
            raise UserError(f"{name} does not exist here; {RENAMED[name]}")
    args = build_parser().parse_args(words)
    SaveClock(args.save_freq)
    if args.dense and args.distill:
        raise UserError("--distill teaches a dynamic model; leave it out with --dense")
    return args


def dashed(argv: list[str]) -> list[str]:
    """Lets every flag be written with _ as well as with -."""
    dashed_argv = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed_argv.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return dashed_argv


def take(kind: type[T], args: argparse.Namespace, **others: Any) -> T:
    """A dataclass from the flags that bear its fields' names."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.name not in others}, **others)


def model_spec(args: argparse.Namespace, base: ModelSpec | None, resumed: bool) -> ModelSpec:
    """What the flags say of the model, and a checkpoint's description (base) where they say nothing.

    resumed: the checkpoint is that of the model itself, and not of a dense one that it starts from.
    """
    if resumed and base is not None and base.dense != args.dense and not args.eval:
        raise UserError(
            "the run to resume trained a different kind of model; pass its checkpoint as --pretrained instead"
        )
    dense = args.dense or (args.eval and resumed and base is not None and base.dense)
    spec = with_flags(args, base or ModelSpec(), dense)
    if resumed and base is not None:
        for difference in base.differences(spec):
            log(f"differs from the checkpoint: {difference}")
    return spec


def with_flags(args: argparse.Namespace, base: ModelSpec, dense: bool) -> ModelSpec:
    if args.arch not in (None, base.arch):
        base = ModelSpec(args.arch, base.base_rate, num_classes=base.num_classes)  # its sizes are another one's
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes = {name: one_or_tuple(value) for name, value in sizes.items()}
    given = {"sizes": {**base.sizes, **sizes}, "dense": dense, "img_size": args.input_size}
    given |= {"scorer": args.scorer, "reducer": args.reducer, "base_rate": args.base_rate}
    given["merge_streams"] = args.merge_streams or None
    given = {name: value for name, value in given.items() if value is not None}
    spec = replace(base, **given)
    if args.pruning_loc is not None:
        spec = replace(spec, pruning_loc=tuple(args.pruning_loc))
    if args.keep_rates is not None:
        return replace(spec, keep_rates=tuple(args.keep_rates))
    other_stages = spec.keep_rates and spec.pruning_loc and len(spec.keep_rates) != len(spec.pruning_loc)
    if args.base_rate is not None or other_stages:
        return replace(spec, keep_rates=None)
    return spec


def one_or_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return value[0] if len(value) == 1 else tuple(value)
    return value


def load_trained_model(args: argparse.Namespace) -> tuple[nn.Module, bool, dict[str, Any]]:
    """A model in eval mode, whether what it has beside its dense backbone is trained, and its run's flags.

    The model is as its checkpoint says, but for what the flags say. For tools: args has the flags of
    add_model_flags and --resume (a checkpoint, a run's folder or a saved model's; None: the newest run under
    logs/). Raises UserError.
    """
    path = args.pretrained or args.resume or newest_run()
    content = read_checkpoint(path)
    base, weights = spec_of(content), find_weights(content)
    if base is None and args.arch is None:
        raise UserError(f"{path} does not name its architecture; add --arch")
    base = base or ModelSpec(args.arch, num_classes=num_classes_of(weights))
    if args.resume and base.dense:
        raise UserError(f"{path} is of a dense run; give a dynamic one with --resume (or --pretrained {path})")
    set_seed(0)  # untrained predictors that choose the same tokens tomorrow
    model = build_model(with_flags(args, base, args.dense))
    notes = load_weights(model, weights)
    for note in notes:
        log(note)
    log(f"{path}: {model.spec.arch}, {model.spec.num_classes} classes")
    trained = not any("untrained" in note for note in notes)
    return model.eval(), trained, settings_of(content)


def newest_run() -> Path:
    runs = [path for name in (BEST, LAST) for path in RUNS.rglob(name)]
    if not runs:
        raise UserError(f"no trained run under {RUNS}/; give --resume RUN_OR_CHECKPOINT, or --arch and --pretrained")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


def changes(args: argparse.Namespace, content: dict[str, Any]) -> list[str]:
    """How the flags differ from those that a checkpoint was written with."""
    base = spec_of(content)
    spec = with_flags(args, base or ModelSpec(), args.dense)
    earlier = settings_of(content)
    now = vars(with_recipe(args, spec))
    different = [
        f"--{name.replace('_', '-')} {earlier[name]} -> {value}"
        for name, value in now.items()
        if name not in (*MODEL_FLAGS, *MAY_CHANGE) and name in earlier and not equal(earlier[name], value)
    ]
    if args.base_rate is not None and args.keep_rates is None and earlier.get("keep_rates"):
        different.append(f"--keep-rates {earlier['keep_rates']} -> --base-rate {args.base_rate}")
    return different + (base.differences(spec) if base else [])


def equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def with_recipe(args: argparse.Namespace, spec: ModelSpec) -> argparse.Namespace:
    """The flags, with the recipe's values for those that were not given."""
    args = argparse.Namespace(**vars(args))
    if args.recipe is None:
        args.recipe = default_recipe(spec)
    defaults = dict(RECIPES[args.recipe])
    if not is_spatial(spec.arch):
        defaults["ratio_weight"] = RECIPES["neurips"]["ratio_weight"]
    if args.recipe == "neurips" and args.warmup_epochs is not None:
        defaults["frozen_epochs"] = args.warmup_epochs  # its script knows one number for both
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.cls_weight == 0 and not args.distill and not args.eval:
        raise UserError(
            "--cls-weight 0 (as in --recipe label-free) leaves nothing to learn from but the dense model: add --distill"
        )
    return args


def default_recipe(spec: ModelSpec) -> str:
    """The paper's that the model is from; without predictors to train, the one without labels."""
    if is_spatial(spec.arch):
        return "journal"
    return "neurips" if spec.scorer == "predictor" or spec.dense else "label-free"


def is_spatial(arch: str) -> bool:
    return arch.startswith(("swin", "convnext"))


def recipe(args: argparse.Namespace) -> Recipe:
    """From with_recipe's flags. Raises UserError for values that do not go together."""
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2 and not args.eval:
        raise UserError(
            f"mixup pairs images: --batch-size must be even, got {args.batch_size} (or --mixup 0 --cutmix 0)"
        )
    return take(Recipe, args)


def augmentation(args: argparse.Namespace) -> Augmentation:
    return take(Augmentation, args, scale=tuple(args.scale))


def data_options(args: argparse.Namespace, num_classes: int | None) -> DataOptions:
    return take(DataOptions, args, num_classes=args.num_classes or num_classes)


def count_classes(args: argparse.Namespace, spec: ModelSpec, known: int, trained: int | None) -> int:
    """How many classes the model is to have. known: classes of the data, 0 without labels. trained: classes of its
    weights, 0 where these have no classifier, None where a new one is to be trained."""
    if trained is not None and gives_embeddings(replace(spec, num_classes=trained)):
        if args.cls_weight > 0 and not args.eval:
            raise UserError("the model gives embeddings, which labels say nothing of: use --cls-weight 0 --distill")
        return trained
    wanted = args.num_classes or known or trained
    if wanted is None:
        raise UserError("the images have no labels, which a model without trained weights needs")
    if wanted < known:
        raise UserError(f"--num-classes {wanted} is less than the {known} classes of the data set")
    if trained not in (None, wanted):
        raise UserError(
            f"{args.pretrained or 'the weights file'} knows {trained} classes, the data set has {wanted}: "
            "train a dense model on it first (--dense --pretrained FILE) and start from that"
        )
    return wanted


def choose_class_names(
    args: argparse.Namespace, spec: ModelSpec, classes: Sequence[str], num_classes: int
) -> tuple[str, ...] | None:
    """What to save with the model: its own names, unless it is dense and trains; else those of its labelled data."""
    if args.eval or (spec.class_names is not None and not spec.dense):
        return spec.class_names
    learned = args.cls_weight > 0 and len(classes) == num_classes and all(name.isprintable() for name in classes)
    return tuple(classes) if learned else None


def place(args: argparse.Namespace) -> Place:
    return take(Place, args, evaluating=args.eval)


def run_options(args: argparse.Namespace, recipe: Recipe, steps_per_epoch: int) -> RunOptions:
    return RunOptions(
        place=place(args),
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        step_images=recipe.step_images,
        save_freq=args.save_freq,
        dist_eval=args.dist_eval,
        compare_with_dense=recipe.cls_weight == 0,
        settings=vars(args),
    )
