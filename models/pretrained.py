"""Reading checkpoints of every origin, and fitting their weights to a model.

Files are only ever data: torch.load runs with weights_only, so that nothing in a file can run code.
"""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from .factory import ARCHS, check_known
from .families import family_of
from .saved import looks_like_saved, read_saved
from .spec import CheckpointError, ModelSpec, StateDict

PRETRAINED = Path(__file__).parents[1] / "pretrained"
BEST, LAST = "checkpoint_best.pth", "checkpoint_last.pth"  # in a run's folder
EXPORTED = (".onnx", ".pt2")
WEIGHT_KEYS = ("model", "state_dict")  # ours and DeiT's, timm's; else the file is a bare state dict
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
HEADS = ("head", "aux_head", "head_dist", "head.fc")  # of all families
NEW = ("score_predictor", "fast_path", "fastmlp")  # in the names of what a dynamic model adds to its backbone


def is_new(name: str) -> bool:
    """Whether a parameter of this name is none of the backbone's."""
    return any(part in name for part in NEW)


def backbone_part(weights: StateDict) -> StateDict:
    """What a dynamic model's weights hold of its dense backbone's."""
    return {name: value for name, value in weights.items() if not is_new(name)}


def read_checkpoint(path: str | Path) -> dict:
    """Everything that a .pth, .tar or .safetensors file holds, or a saved model's folder, or a run's best epoch.

    On the CPU. Raises CheckpointError.
    """
    if looks_like_saved(path):
        spec, weights = read_saved(path)
        return {"model": weights, "spec": spec.to_dict()}
    path = checkpoint_in(path)
    if path.is_dir():
        raise CheckpointError(f"no {BEST}, {LAST} or config.json in {path}")
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    if path.suffix in EXPORTED:
        raise CheckpointError(f"{path} is an exported model, which can only be run; give what it was exported from")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Published DynamicViT files carry their arguments as a Namespace, which is mere data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make its reader fail in any way
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} refused: it holds Python objects that could run code; "
                "re-save it with tensors, numbers and strings only"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged; download it again, or give another file"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not named weights")
    return content


def checkpoint_in(path: str | Path, names: Sequence[str] = (BEST, LAST)) -> Path:
    """The first of these files that a run's folder has; any other path is left as it is."""
    return next((Path(path, name) for name in names if Path(path, name).is_file()), Path(path))


def find_weights(content: dict) -> StateDict:
    """The state dict inside a checkpoint's content, wrapper prefixes removed, in float32."""
    weights = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in weights.items()):
        raise CheckpointError(f"no weights found in the checkpoint; it holds: {', '.join(map(str, content))}")
    for prefix in WRAPPER_PREFIXES * 2:  # either may be wrapped in the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def read_dense_weights(spec: ModelSpec, file: str | None) -> StateDict:
    """Trained weights of a spec's dense backbone.

    file: a checkpoint; None: the architecture's file in pretrained/ (see download_pretrain.sh), or for a timm
    name what timm downloads. Raises CheckpointError if there are none.
    """
    if file:
        return find_weights(read_checkpoint(file))
    check_known(spec.arch)
    if spec.arch not in ARCHS:
        return download_weights(spec.arch)
    name = ARCHS[spec.arch].weights
    if name is None:
        raise CheckpointError(
            f"no weights are published for {spec.arch}: train it with --dense, then give --pretrained FILE"
        )
    path = PRETRAINED / name
    if not path.is_file():
        raise CheckpointError(
            f"no dense weights {path}; get them: sh download_pretrain.sh {spec.arch} "
            "(or --pretrained FILE; to train them: --dense)"
        )
    return find_weights(read_checkpoint(path))


def download_weights(arch: str) -> StateDict:
    """timm's own weights, from its cache or the Hugging Face hub."""
    try:
        return timm.create_model(arch, pretrained=True).state_dict()
    except RuntimeError as error:  # "no pretrained weights exist"
        raise CheckpointError(f"{error}; give --pretrained FILE") from error
    except Exception as error:  # no network, no such file, no space: every layer below has errors of its own
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot get timm's weights of {arch} ({reason}); give --pretrained FILE") from error


def num_classes_of(weights: StateDict) -> int:
    """Number of classes of the classifier in a state dict; 0 without one."""
    return next((len(weights[f"{head}.weight"]) for head in ("head", "head.fc") if f"{head}.weight" in weights), 0)


def load_weights(model: nn.Module, weights: StateDict, new_head: bool = False) -> list[str]:
    """Loads weights into a model and returns notes for the user on what was adapted.

    Position embeddings are interpolated to the model's grid. Predictors may be missing (a dense
    file starts a dynamic model). new_head: a head of another number of classes is left out and
    starts anew. Raises CheckpointError that names everything else that does not fit.
    """
    weights = family_of(model).map_published(weights, model)
    weights = dict(weights)
    target = model.state_dict()
    notes = []
    if _resize_pos_embed(model, weights):
        notes.append(f"position embeddings interpolated to {model.patch_embed.grid_size} patches")
    dropped = []
    if new_head:
        heads = [f"{head}.{part}" for head in HEADS for part in ("weight", "bias")]
        dropped = [n for n in heads if n in weights and n in target and weights[n].shape != target[n].shape]
        for name in dropped:
            del weights[name]
        if dropped:
            notes.append(f"new head for {model.num_classes} classes ({', '.join(dropped)})")
    new = [name for name in target if name not in weights]
    added = [name for name in target if is_new(name)]
    untrained = bool(added) and all(name in new for name in added)
    missing = [n for n in new if n not in dropped and not (untrained and n in added)]
    unexpected = [name for name in weights if name not in target]
    misfits = [
        f"{name} {tuple(weights[name].shape)} for {tuple(target[name].shape)}"
        for name in target
        if name in weights and weights[name].shape != target[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not in the model", unexpected), ("of another shape", misfits))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model (another --arch, size, --pruning-loc, --dense?); {'; '.join(problems)}"
        )
    model.load_state_dict(weights, strict=False)
    if untrained:
        notes.append("the predictors are untrained: the weights are a dense model's")
    return notes


def _resize_pos_embed(model: nn.Module, weights: StateDict) -> bool:
    """Interpolates weights["pos_embed"] to the model's grid, if it has another one."""
    source = weights.get("pos_embed")
    target = getattr(model, "pos_embed", None)
    if source is None or target is None or source.ndim != 3 or source.shape[1] == target.shape[1]:
        return False
    num_prefix = target.shape[1] - model.patch_embed.num_patches  # prefix tokens need not have a position
    side = (source.shape[1] - num_prefix) ** 0.5
    if source.shape[2] != target.shape[2] or side != int(side):
        return False
    weights["pos_embed"] = resample_abs_pos_embed(
        source, new_size=model.patch_embed.grid_size, num_prefix_tokens=num_prefix
    )
    return True
