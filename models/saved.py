"""A model in a folder: its weights, and the description from which it is built again.

    models.save_pretrained(model, "fast", class_names=names)
    model = models.from_pretrained("fast")            # or "user/name", on the Hugging Face hub

The weights are model.safetensors, the description is config.json. Both are mere data: nothing in them
can run code, name another file or reach the network, and what they ask for is compared with what is
there before memory is taken for it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from . import huggingface
from .describe import data_config, describe
from .factory import ARCHS, build_model
from .families import make_dynamic
from .spec import CheckpointError, ModelError, ModelSpec, StateDict
from .version import __version__

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MAX_CONFIG_BYTES = 64 * 2**20  # a million class names
MAX_UNSAVED_BYTES = 2**30  # of position tables, masks and the like, which a model makes by itself
# What differs between a model that has trained or run and one that is newly built, but is no part of what it computes.
PASSING_STATE = {
    *("training", "fused_attn", "rests", "grad_checkpointing", "drop_prob", "p", "class_names"),
    *("all_outputs", "restore", "built_pool", "built_depth"),
}


def save_pretrained(
    model: nn.Module, folder: str | Path, class_names: Sequence[str] | None = None, **notes: Any
) -> None:
    """Writes model.safetensors and config.json, which from_pretrained reads.

    model: from create_model or from_pretrained, or a timm model, made dynamic or not. notes: how the
    model was made (recipe="...", accuracy=...), kept for the reader. A folder that could not be written
    to its end is refused by from_pretrained. Raises ModelError if the model could not be built again from
    its description, or nothing can be written. A transformers model is written by its own save_pretrained, with
    the stages in its config.
    """
    if isinstance(model, huggingface.PreTrainedVisionModel):
        huggingface.save(model, folder, class_names, notes)
        return
    spec = describe_model(model, class_names)
    check_rebuilds(spec, model)
    folder = Path(folder)
    weights, config = (folder / f"{name}.tmp" for name in (WEIGHTS, CONFIG))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        weights.write_bytes(save(state, metadata={"format": "pt"}))  # save_file leaves it readable for its owner alone
        config.write_text(config_text(spec, sha256_of(weights), **notes))
        flush(weights)
        flush(config)
        os.replace(weights, folder / WEIGHTS)
        os.replace(config, folder / CONFIG)
    except (OSError, RuntimeError, SafetensorError) as error:
        for path in (weights, config):
            with suppress(OSError):
                path.unlink()
        raise CheckpointError(f"cannot save the model in {folder} ({first_line(error)})") from error


def from_pretrained(source: str | Path, revision: str | None = None) -> nn.Module:
    """The model that save_pretrained wrote, in eval mode, on the CPU, in float32.

    source: a folder, or user/name on the Hugging Face hub (then revision: a branch, tag or commit there).
    The model has data_config, what timm.data.create_transform takes for its preprocessing, and
    class_names (None if they were not saved). Raises CheckpointError for anything missing or not fitting.
    """
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{source} is not a saved model's folder (checkpoints.load_model reads checkpoints)")
    if not folder.is_dir():
        folder = download(str(source), revision)
    if huggingface.is_saved_by_transformers(folder):
        return load_transformers(folder)
    spec, weights = read_saved(folder)
    model = build_model(spec)
    model.load_state_dict(weights)
    if spec.dense:  # a dynamic model has them by itself
        model.data_config, model.class_names = data_config(model.spec), model.spec.class_names
    return model.eval()


def load_transformers(folder: Path) -> nn.Module:
    """The dynamic model that transformers has written, with the stages that its config has."""
    model = huggingface.load_dense(folder)
    stages = huggingface.stages_in(model, folder)
    try:
        make_dynamic(model, **stages)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its {CONFIG} has stages that cannot be ({first_line(error)})") from error
    huggingface.load_predictors(model, folder)
    return model


def looks_like_saved(path: str | Path) -> bool:
    """Whether from_pretrained is the one to read it, be it whole or not."""
    return any((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS))


def read_saved(folder: str | Path) -> tuple[ModelSpec, StateDict]:
    """Description and weights of a saved model. Raises CheckpointError unless they fit each other."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no {name} in {folder}: not a saved model, or one that was not written to its end "
                "(checkpoints.load_model reads a run's folder)"
            )
    spec, digest = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    check_shapes(build_on_meta(spec, folder / CONFIG), weights)
    if sha256_of(weights) != digest:
        raise CheckpointError(
            f"{weights} is damaged, or is not the one that {CONFIG} was written for; save or download both again"
        )
    return spec, load_file(weights)


def config_text(spec: ModelSpec, digest: str = "", **notes: Any) -> str:
    """What config.json holds; exported files carry it, too. digest: the sum of the weights beside it."""
    content = {"model": spec.to_dict(), "sha256": digest, "dynamicvit": __version__, "notes": notes}
    return json.dumps(content, indent=1, default=str) + "\n"


def describe_model(model: nn.Module, class_names: Sequence[str] | None) -> ModelSpec:
    """The spec of a model as it is now, to be saved."""
    spec = describe(model)
    if spec.arch not in ARCHS and not timm.is_model(spec.arch):
        raise CheckpointError(
            f"cannot tell how this {spec.arch} was built; build it with create_model or timm.create_model"
        )
    if class_names is not None:
        spec = replace(spec, class_names=tuple(class_names))
    check_values(spec)
    return spec


def check_rebuilds(spec: ModelSpec, model: nn.Module) -> None:
    """Raises CheckpointError unless spec builds the same modules with the same settings and shapes."""
    rebuilt = build_on_meta(spec, "the model's description")
    pairs = dict(model.named_modules()), dict(rebuilt.named_modules())
    odd = sorted(pairs[0].keys() ^ pairs[1].keys())
    for name in sorted(pairs[0].keys() & pairs[1].keys()):
        kinds = differing(*(settings(modules[name]) for modules in pairs))
        odd += [f"{name or type(model).__name__}.{kind}" for kind in kinds]
    odd += differing(shapes_of(model.state_dict()), shapes_of(rebuilt.state_dict()))
    if odd:
        raise CheckpointError(
            f"this model is not what {spec.arch} builds (it differs in {', '.join(odd[:3])}), so it could not be "
            "loaded again: of a timm model only its name, its classes and its image size are saved"
        )


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that only one of them has."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module was made with: heads, kernel sizes, pooling, rates and so on."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
    return {n: v for n, v in plain.items() if n not in PASSING_STATE} | {"type": type(module).__name__}


def shapes_of(state: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def read_config(path: Path) -> tuple[ModelSpec, str]:
    """The description and the sum of the weights that it was written for."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is too large to be a model's description")
    return parse_config(path.read_bytes(), path)


def parse_config(text: str | bytes, origin: str | Path) -> tuple[ModelSpec, str]:
    try:
        content = json.loads(text)
        spec = ModelSpec.from_dict(content["model"])
        check_values(spec)
        return spec, str(content["sha256"])
    except Exception as error:  # a hostile file can be wrong in any way, down to numbers of thousands of digits
        reason = f"no {error} in it" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{origin} does not describe a model ({reason})") from error


def check_values(spec: ModelSpec) -> None:
    """What no building of the model would notice, or too late. Raises ModelError."""
    if any(isinstance(value, (tuple, list)) and len(value) > 4 for value in spec.sizes.values()):
        raise ModelError("a size of more than four numbers, one a stage")
    if isinstance(spec.img_size, tuple) and len(spec.img_size) != 2:
        raise ModelError(f"img_size is one number or (height, width), got {spec.img_size}")
    if (how := spec.preprocessing) is not None:
        numbers = (*how.mean, *how.std, how.crop_pct)
        usable = len(how.mean) == len(how.std) == 3 and all(math.isfinite(number) for number in numbers)
        if not usable or min(how.std) <= 0 or not 0.1 <= how.crop_pct <= 2 or how.interpolation not in INTERPOLATIONS:
            raise ModelError(f"unusable preprocessing: {how}")
    names = spec.class_names
    if names is not None and not (
        isinstance(names, tuple) and all(isinstance(name, str) and name.isprintable() for name in names)
    ):
        raise ModelError("class names must be strings that can be printed on one line")
    if names is not None and spec.num_classes is not None and len(names) != spec.num_classes:
        raise ModelError(f"{len(names)} class names for {spec.num_classes} classes")


def build_on_meta(spec: ModelSpec, origin: str | Path) -> nn.Module:
    """The model without memory for its weights. Raises CheckpointError if it cannot be built."""
    try:
        with torch.device("meta"):
            model = build_model(spec)
    except Exception as error:  # timm fails in any way on what it was not made for
        raise CheckpointError(f"{origin} asks for a model that cannot be built ({first_line(error)})") from error
    saved = model.state_dict().keys()
    unsaved = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in saved)
    if unsaved > MAX_UNSAVED_BYTES:
        raise CheckpointError(f"{origin} asks for a model with {unsaved / 2**30:.0f} GiB of tables; it is not built")
    return model


def check_shapes(model: nn.Module, path: Path) -> None:
    """Compares the file's header with the model's state. Raises CheckpointError that names what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged ({first_line(error)})") from error
    expected = shapes_of(model.state_dict())
    if odd := differing(found, expected):
        name = odd[0]
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {name} is {found.get(name, 'missing')} in the file and "
            f"{expected.get(name, 'missing')} in the model; {len(odd)} such names"
        )


def download(name: str, revision: str | None) -> Path:
    """The folder in the hub's cache that holds a model's two files."""
    if not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"no such file or folder: {name}")
    try:
        from huggingface_hub import hf_hub_download, logging  # slow to import, and needed here alone

        logging.set_verbosity_error()  # the error below says it; it need not be announced at every try
        config, weights = (Path(hf_hub_download(name, file, revision=revision)) for file in (CONFIG, WEIGHTS))
    except Exception as error:  # no network, no such model, no permission, no space: each with a type of its own
        raise CheckpointError(
            f"no folder {name}, and no such model could be had from the Hugging Face hub ({first_line(error)})"
        ) from error
    if config.parent != weights.parent:
        raise CheckpointError(f"{name} was changed on the hub while it was downloaded; try again")
    return weights.parent


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """To the disk, so that a file never has its final name without its content."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def first_line(error: Exception) -> str:
    """At most 300 characters, as some errors quote all that they were given."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
