"""A model in a folder: its weights, and the description from which it is built again.

    dynamicvit.save_pretrained(model, "fast", class_names=names)
    model = dynamicvit.from_pretrained("fast")        # or "user/name", on the Hugging Face hub

The weights are model.safetensors, the description is config.json. Both are mere data: nothing in them
can run code, name another file or reach the network, and what they ask for is compared with what is
there before memory is taken for it.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.layers import DropPath, PatchDropout
from timm.models import is_model_pretrained
from torch import nn

from . import huggingface
from .card import CARD_MARK, model_card
from .describe import describe
from .factory import ARCHS, build_model
from .families import make_dynamic
from .reducers import REDUCERS
from .scorers import SCORERS
from .spec import (
    SIZES,
    CheckpointError,
    ModelError,
    ModelSpec,
    Preprocessing,
    StateDict,
    as_tuples,
    check_values,
    first_line,
    one_side,
    plain,
    shown,
)
from .version import __version__

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HUB_NAME = re.compile(r"(?:hf[-_]hub:)?([\w.\-]+/[\w.\-]+)(?:@([\w.\-/]+))?")
FILE_ENDINGS = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors", ".onnx", ".pt2")  # of no model on the hub
HUB_PATIENCE = 5  # seconds to wait for the hub before its cache alone is used
BUILT_IN = {"scorer": frozenset(SCORERS), "reducer": frozenset(REDUCERS)}
INERT = (DropPath, PatchDropout, nn.Dropout, nn.Identity)  # they do nothing in eval mode
# Of the arguments that timm builds a model with, those that a description has, or that no answer depends on.
TIMM_ARGUMENTS = {
    *SIZES,
    "img_size",
    "num_classes",
    "global_pool",
    "drop_rate",
    "drop_path_rate",
    "proj_drop_rate",
    "attn_drop_rate",
}
MAX_CONFIG_BYTES = 64 * 2**20  # a million class names
MAX_UNSAVED_BYTES = 2**30  # of position tables, masks and the like, which a model makes by itself
# What differs between a model that has trained or run and one that is newly built, but is no part of what it computes.
PASSING_STATE = {
    *("training", "fused_attn", "may_fuse", "fused_as_set", "grad_checkpointing", "class_names", "notes"),
    *("all_outputs", "restore", "built_pool", "built_depth"),
}
logger = logging.getLogger(__name__)


def not_finite(model: nn.Module, weights: StateDict) -> str | None:
    """The name of a tensor with values that are not finite. In buffers infinity may have a meaning."""
    parameters = {name for name, _ in model.named_parameters()}
    odd = (n for n, value in weights.items() if value.isnan().any() or (n in parameters and value.isinf().any()))
    return next(odd, None)


def check_savable(model: nn.Module, folder: str | Path, class_names: Sequence[str] | None) -> None:
    if isinstance(class_names, str):
        raise CheckpointError(f"class names must be a list of names, got {shown(class_names)}")
    if not str(folder):
        raise CheckpointError("the name of the folder to save the model in is empty")
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise CheckpointError("this model is not saved: it is on the meta device, without any weights")
    if bad := not_finite(model, state):
        raise CheckpointError(
            f"this model is not saved: {bad} holds NaN or infinity, so its outputs would be meaningless"
        )


def save_pretrained(
    model: nn.Module, folder: str | Path, class_names: Sequence[str] | None = None, **notes: Any
) -> None:
    """Writes model.safetensors and config.json, which from_pretrained reads, and README.md, a model card.

    model: from create_model or from_pretrained, or a timm model, made dynamic or not. notes: how the
    model was made and what it does (recipe="...", accuracy=...), kept for the reader. Files are read back before
    they get their names; from_pretrained refuses a folder that was not completely written.
    A README.md that somebody else wrote is left as it is. Raises ModelError if the model could not be built again
    from its description, or nothing can be written. A transformers model is written by its own save_pretrained, with
    the stages in its config and a preprocessor_config.json beside it.
    """
    check_savable(model, folder, class_names)
    if isinstance(model, huggingface.PreTrainedVisionModel):
        huggingface.save(model, folder, class_names, notes)
        spec, origin = describe(model), huggingface.hub_name(model)
        try:
            write_card(Path(folder), spec, notes, origin)
        except OSError as error:
            raise CheckpointError(f"cannot write {Path(folder, CARD)} ({first_line(error)})") from error
        return
    spec = describe_model(model, class_names)
    folder = Path(folder)
    weights, config = (folder / f"{name}.tmp" for name in (WEIGHTS, CONFIG))
    check_rebuilds(spec, model)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(save(state, metadata={"format": "pt"}))  # save_file: readable for its owner alone
        config.write_text(config_text(spec, sha256_of(weights), **notes))
        flush(weights)
        flush(config)
        check_shapes(build_on_meta(read_config(config)[0], config), weights)
        os.replace(weights, folder / WEIGHTS)
        os.replace(config, folder / CONFIG)
        write_card(folder, spec, notes)
    except (OSError, RuntimeError, SafetensorError, ModelError) as error:
        for path in (weights, config):
            with suppress(OSError):
                path.unlink()
        raise CheckpointError(f"cannot save the model in {folder} ({first_line(error)})") from error
    for line in requirements(spec):
        logger.warning("%s: to load it, first %s", folder, line)


def write_card(folder: Path, spec: ModelSpec, notes: Mapping[str, Any], origin: str | None = None) -> None:
    """Writes README.md, unless there is one that somebody else wrote. origin: see model_card."""
    if not (folder / CARD).exists() or CARD_MARK in (folder / CARD).read_text(encoding="utf-8", errors="replace"):
        (folder / CARD).write_text(model_card(spec, folder.resolve().name, plain(notes), origin), encoding="utf-8")


def push_to_hub(
    model: nn.Module | str | Path,
    name: str,
    *,
    class_names: Sequence[str] | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload model",
    **notes: Any,
) -> str:
    """Publishes a model, or a folder of save_pretrained's, as user/name on the Hugging Face hub; returns its address.

    Only the weights, the description and the card are uploaded, whatever else the folder holds. class_names and
    notes: see save_pretrained. token: of the user's account (default: that of `hf auth login`). Raises ModelError.
    """
    if (match := HUB_NAME.fullmatch(name)) is None or match[2]:
        raise CheckpointError(f"a model's name on the hub must be user/name, got {shown(name)}")
    name = match[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name.partition("/")[2]) if isinstance(model, nn.Module) else Path(model)
        if isinstance(model, nn.Module):
            save_pretrained(model, folder, class_names, **notes)
        elif class_names is not None or notes:
            raise ModelError("class names and notes are those of the folder; give them to save_pretrained")
        spec, origin = check_saved(folder)  # nothing that could not be loaded is published
        called = folder.resolve().name
        if (folder / CARD).is_file():
            card = (folder / CARD).read_bytes()
        else:
            card = model_card(spec, called, {}, origin).encode()
        card = card.replace(f'from_pretrained("{called}")'.encode(), f'from_pretrained("{name}")'.encode())
        files = {WEIGHTS: str(folder / WEIGHTS), CONFIG: str(folder / CONFIG), CARD: card}
        if (processor := folder / huggingface.PROCESSOR).is_file():
            files[processor.name] = str(processor)
        try:
            from huggingface_hub import CommitOperationAdd, HfApi  # slow to import, and needed here alone

            hub = HfApi(token=token)
            address = hub.create_repo(name, private=private, exist_ok=True)
            hub.create_commit(name, [CommitOperationAdd(*file) for file in files.items()], commit_message=message)
        except Exception as error:  # no network, no permission, no space: each with a type of its own
            raise CheckpointError(
                f"cannot publish {name} ({first_line(error)}); log in with `hf auth login`, or give token="
            ) from error
    return str(address)


def check_saved(folder: Path) -> tuple[ModelSpec, str | None]:
    """The description of a saved model that can be loaded, and model_card's origin. Raises CheckpointError."""
    if not huggingface.is_saved_by_transformers(folder):
        return read_saved(folder)[0], None
    model = load_transformers(folder)
    return describe(model), huggingface.hub_name(model)


def load_transformers(folder: Path) -> nn.Module:
    """The dynamic model that transformers has written, with the stages that its config has."""
    model = huggingface.load_dense(folder)
    stages = huggingface.stages_in(model, folder)
    try:
        make_dynamic(model, **stages)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its config has impossible stages ({first_line(error)})") from error
    huggingface.load_predictors(model, folder)
    model.notes = ()
    return model


def requirements(spec: ModelSpec) -> list[str]:
    """What has to be done before the model can be loaded: a line for each method that is not built in."""
    own = [kind for kind, names in BUILT_IN.items() if not spec.dense and getattr(spec, kind) not in names]
    return [f"register its {kind}: {kind.upper()}S[{getattr(spec, kind)!r}] = ..." for kind in own]


def looks_like_saved(path: str | Path) -> bool:
    """Whether from_pretrained should read it, complete or not."""
    return any((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS))


def read_saved(folder: str | Path) -> tuple[ModelSpec, StateDict]:
    """Description and weights of a saved model, of ours or of timm's. CheckpointError unless they fit each other."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}: not a saved model, or one that was not completely written")
    spec, digest = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    check_shapes(build_on_meta(spec, folder / CONFIG), weights)
    if digest is not None and sha256_of(weights) != digest:
        raise CheckpointError(
            f"{weights} is damaged, or is not the one that {CONFIG} was written for; save or download both again"
        )
    return spec, load_file(weights)


def config_text(spec: ModelSpec, digest: str = "", **notes: Any) -> str:
    """What config.json holds; exported files carry it, too. digest: the sum of the weights beside it."""
    content = {"model": spec.to_dict(), "sha256": digest, "dynamicvit": __version__, "notes": plain(notes)}
    if needed := requirements(spec):
        content["requires"] = needed
    try:
        return json.dumps(content, indent=1) + "\n"
    except TypeError as error:
        raise ModelError(f"notes are strings, numbers, lists and dicts ({error})") from error


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
    """What a module was made with: heads, kernel sizes, pooling, rates and so on; nothing of what is for training."""
    if isinstance(module, INERT):
        return {}
    simple = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple, np.generic))}
    return {n: as_tuples(v) for n, v in simple.items() if n not in PASSING_STATE} | {"type": type(module).__name__}


def shapes_of(state: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def read_config(path: Path) -> tuple[ModelSpec, str | None]:
    """The description and the sum of the weights that it was written for (None: of timm's, which has none)."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is too large to be a model's description")
    return parse_config(path.read_bytes(), path)


def parse_config(text: str | bytes, origin: str | Path) -> tuple[ModelSpec, str | None]:
    try:
        content = json.loads(text)
        if "model" not in content and "architecture" in content:
            return spec_of_timm(content), None
        if "model" not in content and {"model_type", "architectures", "transformers_version"} & set(content):
            raise ModelError(
                "it is a Hugging Face transformers model: dynamicvit accelerate, predict and export take it"
            )
        spec = ModelSpec.from_dict(content["model"])
        digest = str(content["sha256"])
    except Exception as error:  # a hostile file can be wrong in any way, down to numbers of thousands of digits
        reason = f"no {error} in it" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{origin} does not describe a model ({reason})") from error
    for kind, known in (("scorer", SCORERS), ("reducer", REDUCERS)):
        if not spec.dense and (name := getattr(spec, kind)) not in known:
            raise CheckpointError(
                f"{origin} needs the {kind} {name}, which is not built in; before loading it, register it: "
                f"dynamicvit.{kind.upper()}S[{name!r}] = ..."
            )
    return spec, digest


def spec_of_timm(content: Mapping[str, Any]) -> ModelSpec:
    """Of the config.json that timm writes. Raises ModelError for what a description does not have."""
    weights, arguments = content["pretrained_cfg"], content.get("model_args", {})
    if strange := [n for n in arguments if n not in TIMM_ARGUMENTS and (n, arguments[n]) != ("in_chans", 3)]:
        raise ModelError(f"timm's model was built with {strange[0]}; build it with timm, and make the result dynamic")
    tagged = f"{content['architecture']}.{weights.get('tag')}"
    spec = ModelSpec(
        arch=tagged if is_model_pretrained(tagged) else content["architecture"],
        num_classes=content["num_classes"],
        img_size=arguments.get("img_size") or one_side(weights["input_size"][1:]),
        dense=True,
        global_pool=arguments.get("global_pool"),
        sizes={name: arguments[name] for name in SIZES if name in arguments},
        preprocessing=Preprocessing.from_timm(weights),
    )
    check_values(spec)
    return spec


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
    """The folder in the hub's cache that holds a model's two files, or those that transformers wrote. name: user/name,
    also with hf-hub: before it and @revision after it."""
    match = HUB_NAME.fullmatch(name)
    if match is None or name.endswith(FILE_ENDINGS):
        raise CheckpointError(f"no such file{'' if name.endswith(FILE_ENDINGS) else ' or folder'}: {name}")
    repository, revision = match[1], revision or match[2]
    try:
        from huggingface_hub import hf_hub_download, logging  # slow to import, and needed here alone
        from huggingface_hub.errors import EntryNotFoundError

        logging.set_verbosity_error()  # the error below says it; it need not be announced at every try
        with offline_if_unreachable():
            config = Path(hf_hub_download(repository, CONFIG, revision=revision))
            if huggingface.is_saved_by_transformers(config.parent):
                with suppress(EntryNotFoundError):  # not every model has one
                    hf_hub_download(repository, huggingface.PROCESSOR, revision=revision)
            else:
                read_config(config)  # before gigabytes are loaded for nothing
            weights = Path(hf_hub_download(repository, WEIGHTS, revision=revision))
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such model, no permission, no space: each with a type of its own
        raise CheckpointError(
            f"no folder {name}, and no such model could be fetched from the Hugging Face hub ({first_line(error)})"
        ) from error
    if config.parent != weights.parent:
        raise CheckpointError(f"{name} was changed on the hub while it was downloaded; try again")
    return weights.parent


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Inside, only the cache is used if the hub does not answer in time, so that it is not tried again and again."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # of whichever library the hub is asked with
        set_offline(True)
    try:
        yield
    except Exception as error:
        if before or not constants.HF_HUB_OFFLINE:
            raise
        raise CheckpointError(
            f"{constants.ENDPOINT} cannot be reached and the files are not in the cache; check the network"
        ) from error
    finally:
        set_offline(before)


def set_offline(offline: bool) -> None:
    from huggingface_hub import constants, utils

    constants.HF_HUB_OFFLINE = offline
    getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 only a new session takes notice


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
