"""The dense model that is to become faster: a user's own object, a saved folder, or a name with its weights."""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from dynamicvit.errors import UserError, advice
from dynamicvit.models import (
    ARCHS,
    ModelSpec,
    Preprocessing,
    build_model,
    describe,
    find_weights,
    from_pretrained,
    load_weights,
    read_checkpoint,
)
from dynamicvit.models.families import family_of
from dynamicvit.models.huggingface import (
    PreTrainedVisionModel,
    is_saved_by_transformers,
    load_dense,
    said_preprocessing,
)
from dynamicvit.models.pretrained import (
    StateDict,
    backbone_part,
    fetched,
    num_classes_of,
    published_weights,
    spec_of,
)
from dynamicvit.models.spatial import SpatialAdapter
from dynamicvit.models.spec import check_values, text_of
from dynamicvit.models.twins import dense_twin
from dynamicvit.tools.splits import Images
from torch import nn

FEWEST_BLOCKS = 3


FITTED = {"center": "the centre", "squash": "squashed, then the centre", "border": "with a border, then the centre"}


@dataclass(frozen=True)
class Own:
    """What users state about their own weights, where the model's name does not tell."""

    weights: str | Path | None = None
    input_size: int | tuple[int, int] | None = None  # a side in pixels, or (height, width)
    class_names: str | Path | Sequence[str] | None = None  # or a file with one a line
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        if "" in (str(self.weights), str(self.class_names)):
            raise UserError("the name of the weights or of the class names is empty")

    def preprocessing(self, known: Preprocessing) -> Preprocessing:
        given = {name: getattr(self, name) for name in ("mean", "std", "crop_pct")}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(known, **{n: v if n == "crop_pct" else tuple(map(float, v)) for n, v in given.items()})

    def names(self) -> tuple[str, ...] | None:
        if self.class_names is None:
            return None
        if not isinstance(self.class_names, (str, Path)):
            return tuple(self.class_names)
        try:
            if not Path(self.class_names).is_file():  # a FIFO would be waited for without end
                raise OSError("no such file")
            lines = Path(self.class_names).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the class names in {self.class_names} ({error})") from error
        return tuple(line.strip() for line in lines if line.strip())


def as_size(sides: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    """A side in pixels, or (height, width), of what a user gives: one number, or one or two of them."""
    if sides is None or isinstance(sides, int):
        return sides
    if len(sides) not in (1, 2):
        raise UserError(f"an input size is one side, or height and width, not {len(sides)} numbers")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def find_dense(model: nn.Module | str | Path, own: Own) -> tuple[nn.Module, list[str]]:
    """The dense model with its weights, and notes on what was adapted or assumed. A user's object is copied."""
    if isinstance(model, nn.Module) or not is_name(str(model)):
        if own.weights or own.input_size:
            raise UserError("a model object has its own weights and size: give these only with a model's name")
        given = model if isinstance(model, nn.Module) else load(model)
        dense, notes = as_dense(given), []
        if not describe(given).dense:
            notes = ["the given model is already dynamic: its dense backbone is made faster"]
        check_blocks(dense, dense.spec.arch)
    else:
        dense, notes = build_by_name(str(model), own)
    spec = replace(dense.spec, preprocessing=own.preprocessing(dense.spec.preprocessing))
    dense.spec = replace(spec, class_names=own.names() or spec.class_names)
    check_values(dense.spec)
    return dense, [*notes, *assumed(dense, own)]


def load(source: str | Path) -> nn.Module:
    """What from_pretrained loads; from a transformers folder, or such a model on the hub, the dense model."""
    folder = fetched(source)
    return load_dense(folder) if is_saved_by_transformers(folder) else from_pretrained(folder)


def as_dense(model: nn.Module) -> nn.Module:
    """A copy that may be changed; of a dynamic model, its backbone. UserError for one that accelerate cannot take."""
    of_transformers, spec = isinstance(model, PreTrainedVisionModel), describe(model)
    if not spec.dense:
        return dense_twin(model).float()
    dense = copy.deepcopy(model)
    dense.spec = spec
    return dense.float() if of_transformers else dense  # which is loaded in the precision that it was saved in


def build_by_name(name: str, own: Own) -> tuple[nn.Module, list[str]]:
    check_name(name)
    content = read_checkpoint(own.weights) if own.weights else None
    spec = spec_by_name(name, content, own.input_size)
    dense = build_model(spec)
    check_blocks(dense, name)
    weights, notes = dense_weights(spec, content)
    return dense, [*notes, *load_weights(dense, weights)]


def check_blocks(dense: nn.Module, arch: str) -> None:
    """Raises UserError for a model without transformer blocks."""
    try:
        family = family_of(dense)
        if not isinstance(family, SpatialAdapter):
            if (depth := len(family.blocks(dense))) < FEWEST_BLOCKS:
                raise UserError(f"{arch} has {depth} transformer blocks; merging needs at least {FEWEST_BLOCKS}")
            return
    except ValueError as error:
        if isinstance(dense, PreTrainedVisionModel):
            raise UserError(str(error)) from error
    raise UserError(f"{arch} has no transformer blocks to merge tokens between: give a ViT")


def is_name(model: str) -> bool:
    """Whether it names an architecture, and not a folder, a file or user/name on the Hugging Face hub."""
    return model in ARCHS or timm.is_model(model) or not (Path(model).exists() or "/" in model)


def check_name(name: str) -> None:
    """Raises UserError for an unknown name, with similar ones."""
    known = timm.list_models(pretrained=True) if "." in name else timm.list_models()
    if name in ARCHS or name in known or (timm.is_model(name) and "." not in name):
        return
    near = difflib.get_close_matches(name, [*ARCHS, *known], n=3, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else "; timm's names: timm.list_models('vit*')"
    raise UserError(f"no model is called {name}{hint}")


def spec_by_name(name: str, content: dict[str, Any] | None, input_size: int | tuple[int, int] | None) -> ModelSpec:
    """The dense model of this name, as described in the weights file if it has a description."""
    described = spec_of(content) if content else None
    spec = described if described is not None and described.arch == name else ModelSpec(name)
    num_classes = num_classes_of(find_weights(content)) if content else spec.num_classes
    size = input_size or spec.img_size
    if content is None and "." not in name and timm.is_model(name) and (tag := timm.get_pretrained_cfg(name).tag):
        spec = replace(spec, arch=f"{name}.{tag}")  # whose weights they will be
    return replace(spec, dense=True, num_classes=num_classes, img_size=size, pruning_loc=None, keep_rates=None)


def dense_weights(spec: ModelSpec, content: dict[str, Any] | None) -> tuple[StateDict, list[str]]:
    """Weights from the file, or the published ones; with notes. Raises CheckpointError if there are none."""
    if content is None:
        with advice("or give --weights FILE"):
            return published_weights(spec.arch), []
    weights = find_weights(content)
    backbone = backbone_part(weights)
    left_out = len(backbone) < len(weights)
    return backbone, ["the predictors in the weights are left out: tokens are ranked without them"] * left_out


def assumed(dense: nn.Module, own: Own) -> list[str]:
    """How images are prepared, as a note, if that is only assumed."""
    unsaid = isinstance(dense, PreTrainedVisionModel) and said_preprocessing(dense) is None
    if (own.weights is None and not unsaid) or None not in (own.mean, own.std, own.crop_pct):
        return []
    how, size = dense.spec.preprocessing, text_of(dense.spec.img_size)
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (how.mean, how.std))
    return [
        f"assumed of the {'model, without a readable preprocessor_config.json' if unsaid else 'weights'}: images of "
        f"{size} pixels, {FITTED[how.crop_mode]} {how.crop_pct:.3f} of them, mean {mean}, std {std} "
        f"({'' if unsaid else '--input-size, '}--crop-pct, --mean and --std change this)"
    ]


def label(value: nn.Module | str | Path | Images | None) -> str | None:
    """A name for a report: only the last part of a file's or folder's path, as the report may be published."""
    if value is None:
        return None
    if isinstance(value, (str, Path)):
        return Path(value).resolve().name if Path(value).exists() else str(value)
    return f"{len(value)} files" if isinstance(value, (list, tuple)) else type(value).__name__
