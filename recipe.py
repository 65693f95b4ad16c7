"""The settings of training, as recipes: the papers' and our own. optim.py applies them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dynamicvit.datasets import Augmentation
from dynamicvit.errors import UserError
from dynamicvit.options import (
    BATCH,
    BELOW_ONE,
    EPOCHS,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    check_needs,
    check_settings,
    flag_of,
    setting,
    up_to,
)
from dynamicvit.utils import get_world_size, log

PRECISIONS = ("auto", "bf16", "fp16", "off")
RUN, RECIPE, SCHEDULE, OPTIMIZER, LOSS, MIXING = "run", "recipe", "schedule", "optimizer", "loss", "augmentation"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the NeurIPS paper's, see RECIPES for all.

    The values without a flag belong to a recipe. schedule: "epochs" changes learning rates between epochs, with the
    backbone frozen at first and then slow (a dense model: linear warm-up, cosine), "steps" at every step, linear
    warm-up and cosine for all. lr_images: lr is for a step of this many images, and is scaled to the actual number;
    None: it is used as it is. decay_new_biases: weight decay for the biases and norms of what is new in a model.
    frozen_start: the part before the first stage, where every token is the dense model's, does not learn.
    """

    recipe: str = setting(
        "neurips",
        "sets the defaults of all that follows (default: the recipe of the model's paper; label-free for models "
        "without predictors)",
        group=RECIPE,
        choices=lambda: RECIPES,
    )
    epochs: int = setting(30, "passes over the training images", EPOCHS, group=SCHEDULE)
    lr: float = setting(
        5e-4, "learning rate; neurips: for 512 images a step, scaled to yours", POSITIVE, group=SCHEDULE
    )
    min_lr: float = setting(1e-5, "learning rate that the schedule ends at", NOT_NEGATIVE, group=SCHEDULE)
    backbone_lr_scale: float = setting(0.01, "the backbone's share of the learning rate", NOT_NEGATIVE, group=SCHEDULE)
    warmup_epochs: float = setting(
        5.0,
        "epochs of linear warm-up; neurips with a dynamic model: epochs with the backbone frozen",
        NOT_NEGATIVE,
        group=SCHEDULE,
    )
    frozen_epochs: float | None = setting(
        None,
        "epochs with the backbone frozen",
        NOT_NEGATIVE,
        group=SCHEDULE,
        unset="--warmup-epochs",
    )
    batch_size: int = setting(64, "images for each process and forward pass", BATCH, group=OPTIMIZER)
    update_freq: int = setting(1, "forward passes per optimizer step", up_to(65_536), group=OPTIMIZER)
    weight_decay: float = setting(
        0.05, "AdamW's, for all but the backbone's biases and norms", NOT_NEGATIVE, group=OPTIMIZER
    )
    clip_grad: float | None = setting(None, "largest gradient norm", POSITIVE, group=OPTIMIZER)
    drop_path: float = setting(0.0, "stochastic depth at the last block, 0 at the first", BELOW_ONE, group=OPTIMIZER)
    model_ema: bool = setting(True, "also keep and evaluate the weights' moving average", group=OPTIMIZER)
    model_ema_decay: float = setting(
        0.99996, "share of the old average that each step keeps", SHARE, group=OPTIMIZER, needs="model_ema"
    )
    amp: str = setting("auto", "mixed precision", group=OPTIMIZER, choices=PRECISIONS)
    compile: bool = setting(False, "torch.compile student and teacher, for validation too", group=OPTIMIZER)
    seed: int = setting(0, "for everything random in a run", SEED, group=RUN)
    distill: bool = setting(
        False,
        "learn from the dense backbone",
        group=LOSS,
        excludes={"dense": "a dense model is the teacher, and has none"},
    )
    cls_weight: float = setting(1.0, "weight of the label loss; with 0, no labels are needed", NOT_NEGATIVE, group=LOSS)
    ratio_weight: float = setting(2.0, "weight of the ratio loss (2 for DeiT and LV-ViT)", NOT_NEGATIVE, group=LOSS)
    distill_weight: float = setting(0.5, "weight of the distillation losses", NOT_NEGATIVE, group=LOSS, needs="distill")
    token_weight: float = setting(
        1.0, "weight of the token loss among these; that of the logits is 1", NOT_NEGATIVE, group=LOSS, needs="distill"
    )
    distill_temperature: float = setting(
        1.0, "divides the logits of both models before they are compared", POSITIVE, group=LOSS, needs="distill"
    )
    smoothing: float = setting(0.1, "label smoothing", BELOW_ONE, group=LOSS)
    repeated_aug: bool = setting(True, "each epoch shows a third of the images, three times each", group=MIXING)
    mixup: float = setting(0.8, "how evenly two images are blended (alpha); 0 is off", NOT_NEGATIVE, group=MIXING)
    cutmix: float = setting(1.0, "how evenly two images share the area (alpha); 0 is off", NOT_NEGATIVE, group=MIXING)
    mixup_prob: float = setting(1.0, "probability of mixing", SHARE, group=MIXING)
    mixup_switch_prob: float = setting(
        0.5, "probability of cutmix rather than mixup, where both are on", SHARE, group=MIXING
    )
    mixup_mode: str = setting(
        "batch",
        "one mixing share for a batch, for each pair of images or for each image",
        group=MIXING,
        choices=("batch", "pair", "elem"),
    )
    schedule: str = "epochs"
    lr_images: int | None = 512
    decay_new_biases: bool = True
    frozen_start: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def step_images(self) -> int:
        """Images that all processes together make one optimizer step from."""
        return self.batch_size * self.update_freq * get_world_size()

    @property
    def peak_lr(self) -> float:
        """The learning rate that a schedule comes down from."""
        return self.lr if self.lr_images is None else self.lr * self.step_images / self.lr_images

    @property
    def epochs_frozen(self) -> float:
        """Epochs in which a dynamic model's backbone does not learn."""
        return self.warmup_epochs if self.frozen_epochs is None else self.frozen_epochs

    def check(self, dense: bool, given: Collection[str]) -> None:
        """Raises UserError for values that do not go together. dense: whether a plain backbone is trained. given: the
        names of values that the user has set; a recipe's own that are too long for a short run only cause a warning."""
        check_needs(self, given)
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise UserError(
                f"mixup pairs images: --batch-size must be even, got {self.batch_size} (or give --mixup 0 --cutmix 0)"
            )
        if self.cls_weight == 0 and not self.distill:
            raise UserError(
                "--cls-weight 0 (as in --recipe label-free) leaves nothing to learn from but the dense model: "
                "add --distill"
            )
        if (dense or self.schedule == "steps") and self.warmup_epochs > self.epochs:
            self.say_too_long("warm-up", "warmup_epochs", self.warmup_epochs, given)
        if not dense and self.epochs_frozen > self.epochs:
            name = "warmup_epochs" if self.frozen_epochs is None else "frozen_epochs"
            self.say_too_long("time with the backbone frozen", name, self.epochs_frozen, given)

    def say_too_long(self, what: str, name: str, epochs: float, given: Collection[str]) -> None:
        flag = flag_of(name)
        text = f"a {what} of {epochs:g} epochs ({flag}) is longer than the run of {self.epochs}; give a lower {flag}"
        if name in given:
            raise UserError(text)
        log(f"warning: {text}")


@dataclass(frozen=True)
class Expected:
    """What a recipe costs and what it achieves, for those who have to choose."""

    paper: str
    hardware: str
    hours: str
    result: str
    source: str  # "published", or "measured" with this code

    def __str__(self) -> str:
        return f"{self.paper}. {self.hardware}; hours: {self.hours}. {self.source.capitalize()}: {self.result}"


@dataclass(frozen=True)
class Entry:
    """A recipe in the list. for_models_of: values that differ for the models of another paper."""

    recipe: Recipe
    augmentation: Augmentation
    expected: Expected
    for_models_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


JOURNAL = Recipe(
    recipe="journal",
    epochs=120,
    lr=4e-3,
    min_lr=1e-6,
    warmup_epochs=20.0,
    frozen_epochs=5.0,
    model_ema_decay=0.9999,
    ratio_weight=10.0,
    repeated_aug=False,
    schedule="steps",
    lr_images=None,
    decay_new_biases=False,
)
# Our own, for models that are fast without training and have their dense selves to learn from.
LABEL_FREE = replace(
    JOURNAL,
    recipe="label-free",
    epochs=10,
    lr=1e-5,
    min_lr=0.0,
    warmup_epochs=1.0,
    frozen_epochs=0.0,
    backbone_lr_scale=1.0,
    clip_grad=5.0,
    model_ema_decay=0.99,
    cls_weight=0.0,
    ratio_weight=2.0,
    distill_weight=1.0,
    token_weight=0.0,
    distill_temperature=4.0,
    mixup=0.2,
    cutmix=1.0,
    frozen_start=True,
)
RECIPES = {
    "neurips": Entry(
        Recipe(),
        Augmentation(),
        Expected(
            paper="arXiv 2106.02034, section 4.1, with DeiT's augmentation",
            hardware="ImageNet, 8 GPUs, 96 images each",
            hours="not published",
            result="DeiT-S at base rate 0.7: 79.32 % top-1 (dense 79.8) with 2.9 of 4.6 GFLOPs",
            source="published",
        ),
    ),
    "journal": Entry(
        JOURNAL,
        Augmentation(),
        Expected(
            paper="arXiv 2207.01580 and its code, for Swin and ConvNeXt",
            hardware="ImageNet, 8 GPUs, 128 images each",
            hours="not published",
            result="ConvNeXt-T at base rate 0.7: 81.59 % top-1 with 3.6 GFLOPs; Swin-T: 80.91 % with 4.0",
            source="published",
        ),
        for_models_of={"neurips": {"ratio_weight": 2.0}},
    ),
    "label-free": Entry(
        LABEL_FREE,
        Augmentation(color_jitter=0.0, aa="none", scale=(0.25, 1.0), reprob=0.0),
        Expected(
            paper="docs/label_free.md, for models that are fast without training",
            hardware="500 photos, two cores of a CPU",
            hours="0.1, fine-tuning alone",
            result="DeiT-Tiny with 0.74 of 1.25 GFLOPs answers 97.2 % (standard error 0.5) of new photos as before",
            source="measured",
        ),
    ),
}


def build_recipe(name: str, **changes: Any) -> Recipe:
    """One of RECIPES, with some of its values changed."""
    return replace(RECIPES[name].recipe, **changes)


def build_augmentation(name: str, **changes: Any) -> Augmentation:
    """That of one of RECIPES, with some of its values changed."""
    return replace(RECIPES[name].augmentation, **changes)
