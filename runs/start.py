"""What a run starts from, decided once: from the flags, a checkpoint and the data."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dynamicvit.datasets import Augmentation, DataOptions, build_source
from dynamicvit.errors import UserError, advice
from dynamicvit.models import (
    SCORERS,
    ModelSpec,
    build_model,
    find_weights,
    gives_embeddings,
    load_weights,
    read_checkpoint,
)
from dynamicvit.models.factory import check_known, family_of_name, image_size
from dynamicvit.models.pretrained import BEST, LAST, StateDict, num_classes_of, published_weights, settings_of, spec_of
from dynamicvit.models.spec import SIZES, is_printable
from dynamicvit.options import (
    STEPS,
    ModelFlags,
    OneLineParser,
    add_flags,
    dashed,
    flag_of,
    given,
    setting,
    settings_in,
    take,
)
from dynamicvit.recipe import RECIPES, Recipe
from dynamicvit.runs.checkpoints import Place, read_run
from dynamicvit.runs.clocks import SaveClock
from dynamicvit.utils import log, set_seed
from torch import nn
from torch.utils.data import Dataset

RUN = "run"
# Flags that say what the model is, as a checkpoint does, too.
MODEL_FLAGS = {f.name for f in settings_in(ModelFlags)} - {"pretrained"}
# Flags about where and how a run is executed: it may be resumed with other values of these.
# num_classes is among them as the data tells it only later; weights that do not fit are refused anyway.
MAY_CHANGE = {
    *("resume", "eval", "dist_eval", "output_dir", "data_path", "num_classes", "compile"),
    *("device", "num_workers", "print_freq", "save_freq", "skip_bad_images"),
}
# Flags of the published scripts that no longer exist: what to use instead.
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


def save_frequency(word: str) -> str:
    SaveClock(word)  # raises for anything else
    return word


@dataclass(frozen=True)
class RunFlags:
    """Where and how the command runs."""

    output_dir: str = setting("", "where checkpoints, log.txt and TensorBoard events go (default: nowhere)", group=RUN)
    resume: str = setting(
        "auto",
        "checkpoint, or run folder (its last epoch; with --eval, its best); 'auto': the run in --output-dir; "
        "'none': a new run",
        group=RUN,
    )
    eval: bool = setting(False, "evaluate only", group=RUN)
    device: str = setting("auto", "auto, cuda or cpu", group=RUN)
    print_freq: int = setting(50, "steps between progress lines", STEPS, group=RUN)
    save_freq: str = setting(
        "0",
        "steps (500) or minutes (15m) between checkpoints; 0: only when an epoch ends",
        group=RUN,
        read=save_frequency,
    )

    @property
    def place(self) -> Place:
        return Place(self.output_dir, self.resume, evaluating=self.eval)


@dataclass(frozen=True)
class Flags:
    """What the command line says. recipe, augmentation: the values that it gives, by name."""

    model: ModelFlags
    data: DataOptions
    run: RunFlags
    recipe: Mapping[str, Any]
    augmentation: Mapping[str, Any]


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="main_dynamic_vit.py",
        usage="%(prog)s --data-path FOLDER [flags]",
        description="Trains and evaluates DynamicViT models.",
    )
    for kind in (ModelFlags, DataOptions, RunFlags):
        add_flags(parser, kind)
    parser.group("recipe", "\n".join(f"{name}: {entry.expected}" for name, entry in RECIPES.items()))
    add_flags(parser, Recipe, {name: entry.recipe for name, entry in RECIPES.items()})
    add_flags(parser, Augmentation, {name: entry.augmentation for name, entry in RECIPES.items()})
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """Raises UserError for flags that do not exist, values out of range, and flags that do not go together."""
    words = dashed(sys.argv[1:] if argv is None else argv)
    for word in words:
        name = word.partition("=")[0]
        if name in RENAMED:
            raise UserError(f"{name} does not exist here; {RENAMED[name]}")
    args = build_parser().parse_args(words)
    kinds = (ModelFlags, DataOptions, RunFlags)
    return Flags(*(take(kind, args) for kind in kinds), given(Recipe, args), given(Augmentation, args))


# --- The start


@dataclass(frozen=True)
class Start:
    """spec: of the model, with its classes. weights: of the dense model that it starts or learns from, None if they
    are not needed. earlier: the content of the checkpoint to resume or to evaluate, None for a new run. sources:
    images by "training" and "validation". settings: all flags with their values, for checkpoints and TensorBoard."""

    spec: ModelSpec
    weights: StateDict | None
    earlier: dict[str, Any] | None
    recipe: Recipe
    augmentation: Augmentation
    data: DataOptions
    sources: Mapping[str, Dataset]
    settings: dict[str, Any]
    evaluating: bool

    @property
    def teaches(self) -> bool:
        """Whether the weights are also the dense model's that the model learns from or is compared with."""
        return self.weights is not None and not self.spec.dense and (self.recipe.distill or self.evaluating)

    def counts(self) -> str:
        return " and ".join(f"{len(source)} {name}" for name, source in self.sources.items())


def find_start(flags: Flags) -> Start:
    """The model is as its checkpoint says, except where the flags say otherwise. Raises UserError and ModelError."""
    evaluating = flags.run.eval
    earlier = read_run(flags.run.place, partial(changes, flags))
    content = earlier or (read_checkpoint(flags.model.pretrained) if flags.model.pretrained else {})
    base = spec_of(content)
    spec = describe(flags.model, base, earlier is not None, evaluating)
    recipe, augmentation = choose_recipe(flags, spec)
    if not evaluating:
        recipe.check(spec.dense, flags.recipe)
    labelled = recipe.cls_weight > 0 and not evaluating
    weights = read_weights(flags.model.pretrained, spec, content, earlier is not None, evaluating, recipe.distill)
    kept = find_weights(earlier) if earlier else weights if evaluating or not flags.model.dense else None
    trained = None if kept is None else num_classes_of(kept)  # None: a new classifier is to be trained
    for difference in base.differences(spec) if earlier and base else ():
        log(f"differs from the checkpoint: {difference}")
    data = replace(flags.data, num_classes=flags.data.num_classes or trained)
    read = partial(build_source, options=data, size=image_size(spec), labelled=labelled)
    sources = {"validation": read(False)} if evaluating else {"training": read(True), "validation": read(False)}
    classes = sources["validation"].classes
    embeddings = trained is not None and gives_embeddings(replace(spec, num_classes=trained))
    if embeddings and labelled:
        raise UserError("the model gives embeddings, which labels cannot train: use --cls-weight 0 --distill")
    num_classes = trained if embeddings else count_classes(flags, len(classes), trained)
    names = choose_class_names(spec, classes if labelled else (), num_classes, evaluating)
    return Start(
        spec=replace(spec, num_classes=num_classes, class_names=names),
        weights=weights,
        earlier=earlier,
        recipe=recipe,
        augmentation=augmentation,
        data=data,
        sources=sources,
        settings=settings(flags, recipe, augmentation),
        evaluating=evaluating,
    )


def describe(flags: ModelFlags, base: ModelSpec | None, resumed: bool, evaluating: bool) -> ModelSpec:
    """What the flags say about the model, and a checkpoint's description (base) where they say nothing.

    resumed: the checkpoint is that of the model itself, and not of a dense one that it starts from.
    """
    if not resumed or base is None:
        return with_flags(flags, base or ModelSpec(), flags.dense)
    if base.dense != flags.dense and not evaluating:
        raise UserError(
            "the run to resume trained a different kind of model; pass its checkpoint as --pretrained instead"
        )
    return with_flags(flags, base, base.dense or flags.dense)


def with_flags(flags: ModelFlags, base: ModelSpec, dense: bool) -> ModelSpec:
    """The model as base describes it, except where the flags say otherwise."""
    if flags.arch not in (None, base.arch):
        base = ModelSpec(flags.arch, base.base_rate, num_classes=base.num_classes)  # without another one's sizes
    sizes = {name: one_or_tuple(getattr(flags, name)) for name in SIZES if getattr(flags, name) is not None}
    said = {"sizes": {**base.sizes, **sizes}, "dense": dense, "img_size": flags.input_size}
    said |= {"scorer": flags.scorer, "reducer": flags.reducer, "place": flags.place, "base_rate": flags.base_rate}
    said |= {"pruning_loc": flags.pruning_loc, "merge_streams": flags.merge_streams or None}
    spec = replace(base, **{name: value for name, value in said.items() if value is not None})
    if flags.keep_rates is not None:
        return replace(spec, keep_rates=flags.keep_rates)
    other_stages = spec.keep_rates and spec.pruning_loc and len(spec.keep_rates) != len(spec.pruning_loc)
    if flags.base_rate is not None or other_stages:
        return replace(spec, keep_rates=None)
    return spec


def one_or_tuple(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def choose_recipe(flags: Flags, spec: ModelSpec) -> tuple[Recipe, Augmentation]:
    """The recipe that is asked for, or else the model's, with the values that are given."""
    entry = RECIPES[flags.recipe.get("recipe") or default_recipe(spec)]
    values = {**entry.for_models_of.get(paper_of(spec.arch), {}), **flags.recipe}
    return replace(entry.recipe, **values), replace(entry.augmentation, **flags.augmentation)


def default_recipe(spec: ModelSpec) -> str:
    """That of the model's paper; without predictors to train, the one without labels."""
    learned = spec.scorer not in SCORERS or SCORERS[spec.scorer].learned
    return paper_of(spec.arch) if spec.dense or learned else "label-free"


@cache
def paper_of(arch: str) -> str:
    """The recipe of the paper that a family of backbones is from; of one that cannot be dynamic, the first paper's."""
    try:
        check_known(arch)
    except ValueError:  # an unknown name is refused later, with all that is wrong
        return "neurips"
    return family_of_name(arch).recipe


def settings(flags: Flags, recipe: Recipe, augmentation: Augmentation) -> dict[str, Any]:
    """Every flag's value, by name."""
    parts = (flags.model, flags.data, flags.run, recipe, augmentation)
    values = {f.name: getattr(part, f.name) for part in parts for f in settings_in(type(part))}
    return values | {"frozen_epochs": recipe.epochs_frozen}


def changes(flags: Flags, content: dict[str, Any]) -> list[str]:
    """How the flags differ from those that a checkpoint was written with."""
    base = spec_of(content)
    spec = with_flags(flags.model, base or ModelSpec(), flags.model.dense)
    earlier = settings_of(content)
    different = [
        f"{flag_of(name)} {earlier[name]} -> {value}"
        for name, value in settings(flags, *choose_recipe(flags, spec)).items()
        if name not in MODEL_FLAGS | MAY_CHANGE and name in earlier and not equal(earlier[name], value)
    ]
    if flags.model.base_rate is not None and earlier.get("keep_rates"):
        different.append(f"--keep-rates {earlier['keep_rates']} -> --base-rate {flags.model.base_rate}")
    return different + (base.differences(spec) if base else [])


def equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def read_weights(
    file: str | None, spec: ModelSpec, content: dict[str, Any], resumed: bool, evaluating: bool, distill: bool
) -> StateDict | None:
    """The dense model's weights; None if they are not needed. content: of what is resumed, else of the file."""
    from_scratch = spec.dense and not file and not evaluating
    if from_scratch or (resumed and not (file if evaluating else distill)):
        return None
    if file:
        return find_weights(read_checkpoint(file) if resumed else content)
    with advice("or give --pretrained FILE (to train a backbone: --dense)"):
        return published_weights(spec.arch)


def count_classes(flags: Flags, known: int, trained: int | None) -> int:
    """How many classes a classifier is to have. known: classes of the data, 0 without labels. trained: classes of the
    weights, None where a new classifier is to be trained."""
    wanted = flags.data.num_classes or known or trained
    if wanted is None:
        raise UserError("the images have no labels, but a model without trained weights needs them")
    if wanted < known:
        raise UserError(f"--num-classes {wanted} is less than the {known} classes of the data set")
    if trained not in (None, wanted):
        raise UserError(
            f"{flags.model.pretrained or 'the weights file'} is for {trained} classes, but the data set has {wanted}: "
            "train a dense model on it first (--dense --pretrained FILE) and start from that"
        )
    return wanted


def choose_class_names(
    spec: ModelSpec, classes: Sequence[str], num_classes: int, evaluating: bool
) -> tuple[str, ...] | None:
    """What to save with the model: its own names, unless it is dense and trains; else those of its labelled data."""
    if evaluating or (spec.class_names is not None and not spec.dense):
        return spec.class_names
    learned = 0 < len(classes) == num_classes and all(map(is_printable, classes))
    return tuple(classes) if learned else None


# --- For tools

RUNS = Path("logs")  # where the newest run is looked for


def load_trained_model(flags: ModelFlags, resume: str | None) -> tuple[nn.Module, bool, dict[str, Any]]:
    """A model in eval mode, whether what it has beside its dense backbone is trained, and its run's flags.

    The model is as its checkpoint says, except where the flags say otherwise. For tools. resume: a checkpoint, a
    run's folder or a saved model's; None: the newest run under logs/, unless the flags name weights. Raises UserError.
    """
    source = flags.pretrained or resume or newest_run()
    content = read_checkpoint(source)
    base, weights = spec_of(content), find_weights(content)
    if base is None and flags.arch is None:
        raise UserError(f"{source} does not name its architecture; add --arch")
    base = base or ModelSpec(flags.arch, num_classes=num_classes_of(weights))
    if resume and base.dense:
        raise UserError(f"{source} is from a dense run; give a dynamic one with --resume (or --pretrained {source})")
    set_seed(0)  # so that untrained predictors choose the same tokens every time
    model = build_model(with_flags(flags, base, flags.dense))
    with advice("see --arch, --input-size, --pruning-loc and --dense"):
        notes = load_weights(model, content)
    for note in notes:
        log(note)
    log(f"{source}: {model.spec.arch}, {model.spec.num_classes} classes")
    trained = not any("untrained" in note for note in notes)
    return model.eval(), trained, settings_of(content)


def newest_run() -> Path:
    runs = [file for name in (BEST, LAST) for file in RUNS.rglob(name)]
    if not runs:
        raise UserError(f"no trained run under {RUNS}/; give --resume RUN_OR_CHECKPOINT, or --arch and --pretrained")
    return max(runs, key=lambda file: file.stat().st_mtime).parent
