"""Reading checkpoints of every origin, and fitting their weights to a model.

Files are only ever data: torch.load runs with weights_only, so that nothing in a file can run code.
"""

import argparse
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .spec import ModelError

StateDict = dict[str, Tensor]

WEIGHT_KEYS = ("model", "state_dict")  # ours and DeiT's, timm's; else the file is a bare state dict
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
HEAD_NAMES = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")


class CheckpointError(ModelError):
    """A file that is no usable checkpoint, or weights that do not fit; the message is for the user."""


def read_checkpoint(path: str | Path) -> dict:
    """Everything that a .pth, .tar or .safetensors file holds, on the CPU. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
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
            f"{path} is not a checkpoint, or is damaged; get it anew, or give another file"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not named weights")
    return content


def find_weights(content: dict) -> StateDict:
    """The state dict inside a checkpoint's content, wrapper prefixes removed, in float32."""
    weights = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    if not weights or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in weights.items()):
        raise CheckpointError(f"no weights found in the checkpoint; it holds: {', '.join(map(str, content))}")
    for prefix in WRAPPER_PREFIXES * 2:  # either may be wrapped in the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def load_weights(model: VisionTransformer, weights: StateDict, new_head: bool = False) -> list[str]:
    """Loads weights into a model and returns notes for the user on what was adapted.

    Position embeddings are interpolated to the model's grid. Predictors may be missing (a dense
    file starts a dynamic model). new_head: a head of another number of classes is left out and
    starts anew. Raises CheckpointError that names everything else that does not fit.
    """
    weights = dict(weights)
    target = model.state_dict()
    notes = []
    if _resize_pos_embed(model, weights):
        notes.append(f"position embeddings interpolated to {model.patch_embed.grid_size} patches")
    dropped = []
    if new_head:
        dropped = [n for n in HEAD_NAMES if n in weights and n in target and weights[n].shape != target[n].shape]
        for name in dropped:
            del weights[name]
        if dropped:
            notes.append(f"new head for {model.num_classes} classes ({', '.join(dropped)})")
    new = [name for name in target if name not in weights]
    fresh_predictors = all(name in new for name in target if name.startswith("score_predictor."))
    missing = [n for n in new if n not in dropped and not (fresh_predictors and n.startswith("score_predictor."))]
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
            f"the weights do not fit the model (another --arch, size, or --dense?); {'; '.join(problems)}"
        )
    model.load_state_dict(weights, strict=False)
    if fresh_predictors and any(name.startswith("score_predictor.") for name in new):
        notes.append("the predictors are untrained: the weights are a dense model's")
    return notes


def _resize_pos_embed(model: VisionTransformer, weights: StateDict) -> bool:
    """Interpolates weights["pos_embed"] to the model's grid, if it has another one."""
    source = weights.get("pos_embed")
    if source is None or source.ndim != 3 or source.shape[1] == model.pos_embed.shape[1]:
        return False
    side = (source.shape[1] - model.num_prefix_tokens) ** 0.5
    if source.shape[2] != model.pos_embed.shape[2] or side != int(side):
        return False
    weights["pos_embed"] = resample_abs_pos_embed(
        source, new_size=model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens
    )
    return True
