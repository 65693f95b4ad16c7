"""What a model is, apart from its weights: enough to build it again."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

StateDict = dict[str, Tensor]
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class ModelError(ValueError):
    """A model that cannot be built or used as asked for; the message is for the user."""


class CheckpointError(ModelError):
    """A file that is not a usable checkpoint, or weights that do not fit; the message is for the user."""


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects to be done to an image: timm's names and units.

    crop_pct: the side of the central crop over the shorter side of the resized image. crop_mode: how an image of
    another shape fits: its centre, the whole image squashed, or the whole image with a border.
    """

    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    crop_pct: float = 224 / 256
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, as_tuples(getattr(self, f.name)))

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Of timm's pretrained_cfg."""
        known = [config[name] for name in ("mean", "std", "crop_pct", "interpolation")]
        return cls(*known, config.get("crop_mode", "center"))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 images -> float32, as the model takes them."""
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)


# Largest sizes that a description may ask for. Beyond any model that exists, and small enough that a
# typing error or a hostile file is refused before memory is asked for.
LARGEST = {
    "num_classes": 1_000_000,
    "img_size": 8192,
    "patch_size": 1024,
    "embed_dim": 16384,
    "depth": 256,
    "depths": 256,
    "num_heads": 1024,
    "mlp_ratio": 64,
    "window_size": 1024,
}
NEWER = (
    "place",
    "global_pool",
    "crop_mode",
)  # fields that older versions do not know, saved only where they say something
PLACES = ("before", "inside")  # of a stage: before its block, or between the block's attention and its MLP
SIZES = tuple(name for name in LARGEST if name not in ("num_classes", "img_size"))


@dataclass(frozen=True)
class ModelSpec:
    """Builds a model (see factory.build_model); saved in every checkpoint and beside every saved model.

    None stands for the architecture's own value; the spec of a model that is built has none of them
    left but class_names. sizes holds what differs from the architecture: embed_dim, depth(s), num_heads,
    mlp_ratio, patch_size, window_size. keep_rates, if given, override base_rate. place: of the stages, before their
    blocks or inside. global_pool: timm's name of a pooling that reset_classifier has chosen, None for the
    architecture's own.
    Raises ModelError for a value that is impossible.
    """

    arch: str = "deit_small"
    base_rate: float = 0.7
    num_classes: int | None = None
    img_size: int | tuple[int, int] | None = None
    dense: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)
    pruning_loc: tuple[int, ...] | None = None
    keep_rates: tuple[float, ...] | None = None
    scorer: str = "predictor"
    reducer: str = "drop"
    merge_streams: bool = False
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    place: str = "before"
    global_pool: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, as_tuples(getattr(self, f.name)))
        for name in ("arch", "scorer", "reducer"):
            if not is_word(word := getattr(self, name)):
                what = "an architecture" if name == "arch" else f"a {name}"
                raise ModelError(f"not the name of {what}: {shown(word)}")
        for name in ("dense", "merge_streams"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        if self.place not in PLACES:
            raise ModelError(f"stages must be {' or '.join(PLACES)} blocks, got {shown(self.place)}")
        if self.global_pool is not None and not (is_printable(self.global_pool) and len(self.global_pool) < 20):
            raise ModelError(f"not the name of a pooling: {shown(self.global_pool)}")
        if not isinstance(self.sizes, Mapping):
            raise ModelError(f"sizes must have names, got {shown(self.sizes)}")
        for name, value in {"num_classes": self.num_classes, "img_size": self.img_size, **self.sizes}.items():
            check_size(name, value)
        check_rates("base rate", (self.base_rate,))
        if self.keep_rates is not None:
            check_rates("keep_rates", self.keep_rates)
        if self.pruning_loc is not None and not is_list_of(self.pruning_loc, is_whole):
            raise ModelError(f"pruning_loc must be block numbers, got {shown(self.pruning_loc)}")
        if self.preprocessing is not None and not isinstance(self.preprocessing, Preprocessing):
            raise ModelError(f"not a valid preprocessing: {shown(self.preprocessing)}")
        if self.class_names is not None and not is_list_of(self.class_names, is_printable):
            raise ModelError("class names must be strings that can be printed on one line")

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only, for JSON and for checkpoints."""
        content = without_newer_defaults(plain(asdict(self)), type(self))
        if self.preprocessing is not None:
            content["preprocessing"] = without_newer_defaults(content["preprocessing"], Preprocessing)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ModelSpec":
        """What to_dict gave. Raises ModelError for unknown fields and for values of another kind."""
        if not isinstance(content, Mapping):
            raise ModelError(f"a model's description must have named fields, got {shown(content)}")
        if unknown := [name for name in content if name not in {f.name for f in fields(cls)}]:
            raise ModelError(f"a model's description has no field {shown(unknown[0])}")
        try:
            values = dict(content)
            if values.get("preprocessing") is not None:
                values["preprocessing"] = Preprocessing(**values["preprocessing"])
            spec = cls(**values)
            check_values(spec)
            return spec
        except (TypeError, RecursionError) as error:
            raise ModelError(f"a model's description cannot be read ({error})") from error

    def differences(self, other: "ModelSpec") -> list[str]:
        """Where the other one differs, as "name ours -> theirs"; fields that it leaves open do not count."""
        return [
            f"{f.name} {getattr(self, f.name)} -> {getattr(other, f.name)}"
            for f in fields(self)
            if getattr(other, f.name) is not None and getattr(self, f.name) != getattr(other, f.name)
        ]

    def as_dense(self) -> "ModelSpec":
        """The plain backbone of a dynamic model."""
        return replace(self, dense=True)


def without_newer_defaults(content: dict[str, Any], kind: type) -> dict[str, Any]:
    """Leaves out newer fields that have their default, so that older versions can read the rest."""
    return {name: value for name, value in content.items() if name not in NEWER or value != getattr(kind, name)}


def check_values(spec: ModelSpec) -> None:
    """The checks that need a complete description. Raises ModelError."""
    if (how := spec.preprocessing) is not None:
        colours = all(is_list_of(values, is_number) and len(values) == 3 for values in (how.mean, how.std))
        usable = (
            colours
            and min(how.mean) >= 0
            and max(how.mean) <= 1
            and min(how.std) > 0
            and is_number(how.crop_pct)
            and 0.1 <= how.crop_pct <= 2
        )
        if not usable or how.interpolation not in INTERPOLATIONS or how.crop_mode not in CROP_MODES:
            raise ModelError(f"unusable preprocessing: {shown(how)}")
    if spec.class_names is not None and spec.num_classes not in (None, len(spec.class_names)):
        raise ModelError(f"{len(spec.class_names)} class names for {spec.num_classes} classes")


def check_size(name: str, value: Any) -> None:
    """Raises ModelError for a size that no model has. value: a number, one a stage, or (height, width); or None."""
    if name not in LARGEST:
        raise ModelError(f"a model has no size called {shown(name)}")
    several = isinstance(value, tuple)
    if name == "img_size" and several and len(value) != 2:
        raise ModelError(f"img_size must be one number or (height, width), got {shown(value)}")
    if (name == "depths" and value is not None and not several) or (several and not 1 < len(value) <= 4):
        raise ModelError(f"{name} must be a number, or up to four numbers, one per stage; got {shown(value)}")
    if name in ("depths", "num_heads") and several and len(value) != 4:
        raise ModelError(f"{name} must be four numbers, one per stage; got {shown(value)}")
    lowest = 0 if name == "num_classes" else 1e-9  # no classes: the model gives embeddings
    for number in value if several else (value,):
        if number is None:
            continue
        if not (is_number(number) if name == "mlp_ratio" else is_whole(number, -math.inf)):
            raise ModelError(f"{name} must be a {'' if name == 'mlp_ratio' else 'whole '}number, got {shown(number)}")
        if not lowest <= number <= LARGEST[name]:
            limits = "positive" if number <= LARGEST[name] else f"at most {LARGEST[name]}"
            raise ModelError(f"{name} must be {limits}, got {shown(number)}")


def check_rates(name: str, rates: Any) -> None:
    if not is_list_of(rates, lambda rate: is_number(rate) and 0 < rate <= 1):
        what = shown(rates[0] if name == "base rate" else rates)
        raise ModelError(f"keep rates must lie in (0, 1], got {name} {what}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole(value: Any, lowest: float = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def is_printable(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.\-]+", value) is not None


def is_list_of(values: Any, test: Callable[[Any], bool]) -> bool:
    """Whether values are a tuple, not an empty one, of what passes the test."""
    return isinstance(values, tuple) and len(values) > 0 and all(map(test, values))


def shown(value: Any) -> str:
    """For a message: on one line, printable, and not long, whatever a file holds."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 100 else f"{text[:97]}..."


def first_line(error: Exception) -> str:
    """At most 300 characters, as some errors quote all that they were given."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def one_side(size: Sequence[int]) -> int | tuple[int, int]:
    """(height, width), or one number where they are equal."""
    height, width = size
    return height if height == width else (height, width)


def two_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of one number for both, or of the two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def text_of(size: int | Sequence[int]) -> str:
    """224, or 352 x 480."""
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def plain(value: Any) -> Any:
    """For JSON: numbers of numpy and of tensors become Python's, tuples become lists."""
    value = as_tuples(value)
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def as_tuples(value: Any) -> Any:
    """The same in dicts, tuples and Python's own numbers, whatever arrays, tensors, lists and ranges it is made of."""
    if isinstance(value, Mapping):
        return {name: as_tuples(entry) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(as_tuples(entry) for entry in value) if isinstance(value, (list, tuple, range)) else value
