"""The one door for weights: files, folders and hub names of every origin, and fitting what is in them to a model.

Files are only ever data: torch.load runs with weights_only, so that nothing in a file can run code.
"""

import argparse
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import huggingface
from .describe import data_config
from .factory import ARCHS, build_model, check_known
from .families import family_of
from .saved import (
    build_on_meta,
    download,
    load_transformers,
    looks_like_saved,
    not_finite,
    offline_if_unreachable,
    read_saved,
)
from .spec import CheckpointError, ModelSpec, StateDict, check_values, first_line, one_side, shown, text_of, two_sides

PRETRAINED = Path(__file__).parents[1] / "pretrained"
SCRIPT = "download_pretrain.sh"  # beside it in a clone; not in the installed package
BEST, LAST = "checkpoint_best.pth", "checkpoint_last.pth"  # in a run's folder
EXPORTED = (".onnx", ".pt2")
AVERAGES = ("state_dict_ema", "model_ema")  # timm's and DeiT's names of the weights' moving average
WEIGHT_KEYS = ("model", "state_dict")  # ours and DeiT's, timm's; else the file is a bare state dict
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning
OURS = ("spec", "history")  # only checkpoints of this program have these
HEADS = ("head", "aux_head", "head_dist", "head.fc")  # of all families
NEW = ("score_predictor", "fast_path", "fastmlp")  # in the names of what a dynamic model adds to its backbone
PRETRAINING = ("decoder_", "mask_token")  # what masked autoencoders have besides their encoder
# Names that show whose layout weights have, and what to do about it.
FOREIGN = {
    r"encoder\.layers\.encoder_layer_\d+\.": "torchvision's, whose layers have other names than timm's; take timm's "
    "weights of the same architecture",
    r"(.*\.)?(embeddings\.patch_embeddings?\.|encoder\.layers?\.\d+\.(self_attn|attention)\.)": "of Hugging Face's "
    "transformers, whose layers have other names than timm's; give accelerate the folder that save_pretrained "
    "wrote, or load them with transformers",
}
ROOM = 2**26  # bytes that a model may need beyond twice those of its weights
CONFIRMED = 0.2  # mean similarity of neighbours from which position embeddings are taken for a grid
NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # has another name in numpy 1 than in numpy 2
# Mere data, which torch's reader would refuse.
HARMLESS = [
    argparse.Namespace,  # published DynamicViT files store their arguments like this
    *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name not in ("ObjectDType", "VoidDType")),
]
logger = logging.getLogger(__name__)


def from_pretrained(
    source: str | Path, revision: str | None = None, *, moving_average: bool | None = None
) -> nn.Module:
    """A model as its source describes it, in eval mode, on the CPU, in float32.

    source: a folder of save_pretrained's, a run's folder (then its best epoch), a checkpoint that describes its
    model, or user/name on the Hugging Face hub (then revision: a branch, tag or commit there). moving_average: see
    load_weights. The model has data_config, what timm.data.create_transform takes for its preprocessing; class_names
    (None if they were not saved); and notes, what was adapted or chosen, which are logged as well.
    A folder of a dynamic transformers model is loaded by transformers, in the precision that it was saved in.
    Raises CheckpointError for anything missing or not fitting.
    """
    folder = fetched(source, revision)
    if huggingface.is_saved_by_transformers(folder):
        return load_transformers(Path(folder))
    content = read_checkpoint(folder)
    spec = spec_of(content)
    if spec is None:
        raise CheckpointError(
            f"{source} does not say which model it belongs to; give the folder of a run or a saved model, "
            "or build the model and give the file to load_weights(model, file)"
        )
    model = build_model(spec)
    model.notes = tuple(load_weights(model, content, moving_average=moving_average))
    for note in model.notes:
        logger.warning("%s: %s", source, note)
    if spec.dense:  # a dynamic model has them by itself
        model.data_config, model.class_names = data_config(model.spec), model.spec.class_names
    return model.eval()


def fetched(source: str | Path, revision: str | None = None) -> str | Path:
    """The folder in the cache of a model on the hub; any other source as it is."""
    path = checkpoint_in(source)
    return source if not str(source).strip() or path.exists() else download(str(source), revision)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    new_head: bool = False,
    *,
    moving_average: bool | None = None,
) -> list[str]:
    """Loads weights into a model and returns notes for the user on what was adapted or chosen.

    source: what from_pretrained and read_checkpoint take, the content of a checkpoint, or a state dict.
    Position embeddings are interpolated to the model's grid. Predictors may be missing (a dense
    file starts a dynamic model). new_head: a head of another number of classes is left out and
    starts anew. moving_average: whether to take it where a source also holds the trained weights; None: yes, as timm
    does, except from a run of this program. Raises CheckpointError that names everything else that does not fit; the
    model is then as it was.
    """
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    weights, notes = choose_weights(content, moving_average)
    described = describe(content)
    grid = grid_of(described[1]) if described else None
    weights = family_of(model).map_published(weights, model)
    left_out = [name for name in weights if name.startswith(PRETRAINING) and not hasattr(model, name.split(".")[0])]
    if left_out:
        notes.append(f"left out: {len(left_out)} tensors that only pretraining needs ({left_out[0]}, ...)")
    weights = {name: value for name, value in weights.items() if name not in left_out}
    notes += fit_pos_embed(model, weights, grid)
    target = model.state_dict()
    dropped = []
    if new_head:
        heads = [f"{head}.{part}" for head in HEADS for part in ("weight", "bias")]
        dropped = [n for n in heads if n in weights and n in target and weights[n].shape != target[n].shape]
        for name in dropped:
            del weights[name]
        if dropped:
            notes.append(f"new head for {model.num_classes} classes ({', '.join(dropped)})")
    added = [name for name in target if is_new(name)]
    untrained = bool(added) and not any(name in weights for name in added)
    check_fit(model, weights, may_lack={*dropped, *(added if untrained else ())})
    model.load_state_dict(weights, strict=False)
    if untrained:
        notes.append("the predictors are untrained: the weights are a dense model's")
    return notes


def read_checkpoint(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Everything that a source holds (see from_pretrained), on the CPU, as data. Raises CheckpointError.

    Of a file: what it is, a checkpoint's content or a state dict; of a folder or hub name: "model" and "spec".
    """
    if not str(source).strip():
        raise CheckpointError("the name of the file or folder to load is empty")
    source = fetched(source, revision)
    if looks_like_saved(source):
        return folder_content(Path(source))
    path = checkpoint_in(source)
    if path.is_dir():
        raise CheckpointError(f"no {BEST}, {LAST} or config.json in {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    if path.suffix in EXPORTED:
        raise CheckpointError(
            f"{path} is an exported model, which can only be run; give the model that it was exported from"
        )
    content = read_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not named weights")
    if is_ours(content) or "optimizer" in content:
        check_sums(path)
    return content


def folder_content(folder: Path) -> dict[str, Any]:
    spec, weights = read_saved(folder)
    return {"model": weights, "spec": spec.to_dict()}


def read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make its reader fail in any way
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} refused: it holds Python objects that could run code; "
                "re-save it with tensors, numbers and strings only"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged; download it again, or give another file"
        ) from error


def check_sums(path: Path) -> None:
    """torch.load compares no checksums. For our own files only, as other programs may leave them out,
    and files of torch's old format have none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except Exception:  # what a damaged directory leads to
        damaged = True
    if damaged:
        raise CheckpointError(f"{path} is damaged")


def checkpoint_in(path: str | Path, names: Sequence[str] = (BEST, LAST)) -> Path:
    """The first of these files that a run's folder has; any other path is left as it is."""
    return next((Path(path, name) for name in names if Path(path, name).is_file()), Path(path))


def is_ours(content: Mapping[str, Any]) -> bool:
    return any(name in content for name in OURS)


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the command that wrote a checkpoint; empty where it has none."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args  # published files
    return args if isinstance(args, dict) else {}


def spec_of(content: Mapping[str, Any]) -> ModelSpec | None:
    """The description of the model whose weights a checkpoint holds, if it has one.

    For older files, which have no description, and the published ones it is made from their arguments.
    Raises ModelError for a description of no model, or of one far larger than its weights.
    """
    described = describe(content)
    return described and described[0]


def describe(content: Mapping[str, Any]) -> tuple[ModelSpec, nn.Module] | None:
    """As spec_of, together with the model, without memory for its weights."""
    spec = ModelSpec.from_dict(content["spec"]) if content.get("spec") else spec_of_settings(content)
    if spec is None:
        return None
    model = build_on_meta(spec, "the checkpoint's description")
    needed = sum(value.nbytes for value in model.state_dict().values())
    held = sum(value.numel() * 4 for value in find_weights(content).values())
    if needed > 2 * held + ROOM:
        raise CheckpointError(
            f"the checkpoint describes a model of {needed / 2**20:.0f} MiB, but holds {held / 2**20:.0f} MiB of weights"
        )
    return spec, model


def spec_of_settings(content: Mapping[str, Any]) -> ModelSpec | None:
    args = settings_of(content)
    arch = known_arch(args.get("model")) or known_arch(args.get("arch"))
    if arch is None:
        return None
    sizes = {n: args[n] for n in ARCHS[arch].sizes if args.get(n) is not None}
    sizes = {n: value for n, value in sizes.items() if value != ARCHS[arch].sizes[n]}
    head = find_weights(content).get("head.bias")
    spec = ModelSpec(
        arch=arch,
        base_rate=args.get("base_rate", 0.7),
        num_classes=len(head) if head is not None and head.ndim else args.get("num_classes"),
        img_size=args.get("input_size"),
        dense=bool(args.get("dense")),
        sizes=sizes,
        pruning_loc=args.get("pruning_loc") or ARCHS[arch].pruning_loc,
        keep_rates=args.get("keep_rates") or None,
    )
    check_values(spec)
    return spec


def known_arch(name: object) -> str | None:
    """Our name of an architecture; the published code writes deit-s and swin-t for some."""
    if not isinstance(name, str):
        return None
    ours = {"deit-s": "deit_small", "deit-b": "deit_base", "deit-256": "deit_256"}.get(name, name.replace("-", "_"))
    return ours if ours in ARCHS else None


def find_weights(content: Mapping[str, Any], moving_average: bool | None = None) -> StateDict:
    """The state dict inside a checkpoint's content, wrapper prefixes removed, in float32.

    moving_average: see load_weights. Raises CheckpointError if there is none, or one of unusable tensors.
    """
    return choose_weights(content, moving_average)[0]


def choose_weights(content: Mapping[str, Any], moving_average: bool | None) -> tuple[StateDict, list[str]]:
    """As find_weights, with a note if there were two sets to choose from."""
    held = {key: content[key] for key in (*AVERAGES, *WEIGHT_KEYS) if isinstance(content.get(key), dict)}
    averages, plain = ([held[key] for key in keys if key in held] for keys in (AVERAGES, WEIGHT_KEYS))
    if moving_average and not averages:
        raise CheckpointError("the checkpoint holds no moving average of its weights")
    averaged = bool(averages) and (not is_ours(content) if moving_average is None else moving_average)
    averaged = averaged or not plain
    notes = []
    if averages and plain:
        chosen = "the moving average was taken" if averaged else "the trained ones were taken, not their moving average"
        notes.append(f"of the two sets of weights in the checkpoint {chosen}")
    weights = next(iter(averages if averaged else plain), content)
    if not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in weights.items()) or not weights:
        raise CheckpointError(f"no weights found in the checkpoint; it holds: {', '.join(map(str, content))}")
    weights = without_wrappers(weights)
    for name, value in weights.items():
        check_tensor(name, value)
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}, notes


def without_wrappers(weights: Mapping[str, Tensor]) -> StateDict:
    """Without the prefixes that wrappers, of which one may be in another, put before all names."""
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}  # AveragedModel's counter
    while weights and (prefix := next((p for p in WRAPPER_PREFIXES if all(n.startswith(p) for n in weights)), None)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def check_tensor(name: str, value: Tensor) -> None:
    """Raises CheckpointError for what cannot be a weight, before memory is taken for it."""
    kinds = {
        "sparse": value.layout != torch.strided,
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        "complex": value.is_complex(),
        "meta": value.is_meta,
    }
    if kind := next((kind for kind, applies in kinds.items() if applies), None):
        raise CheckpointError(f"{shown(name)} in the checkpoint is a {kind} tensor; save it as a plain one")
    if value.nbytes > value.untyped_storage().nbytes():  # one number, repeated without end
        raise CheckpointError(f"{shown(name)} in the checkpoint claims {value.numel()} numbers and holds fewer")


def published_weights(arch: str) -> StateDict:
    """Trained weights of a dense backbone: for a name of ours the file in pretrained/ (see download_pretrain.sh),
    for a timm name what timm downloads. Raises CheckpointError if there are none."""
    check_known(arch)
    if arch not in ARCHS:
        return download_weights(arch)
    name = ARCHS[arch].weights
    if name is None:
        raise CheckpointError(f"no weights are published for {arch}")
    if not (PRETRAINED / name).is_file():
        if (PRETRAINED.parent / SCRIPT).is_file():
            raise CheckpointError(f"no dense weights {PRETRAINED / name}; get them: sh {SCRIPT} {arch}")
        raise CheckpointError(f"no dense weights of {arch}; {SCRIPT}, in a clone of this project, gets {name}")
    return find_weights(read_checkpoint(PRETRAINED / name))


def download_weights(arch: str) -> StateDict:
    """timm's own weights, from its cache or the Hugging Face hub."""
    try:
        with offline_if_unreachable():
            return timm.create_model(arch, pretrained=True).state_dict()
    except Exception as error:  # no weights, network, file or space: every layer below has errors of its own
        raise CheckpointError(f"cannot get timm's weights of {arch} ({first_line(error)})") from error


def is_new(name: str) -> bool:
    """Whether a parameter of this name does not belong to the backbone."""
    return any(part in name for part in NEW)


def backbone_part(weights: StateDict) -> StateDict:
    """The dense backbone's weights among those of a dynamic model."""
    return {name: value for name, value in weights.items() if not is_new(name)}


def num_classes_of(weights: StateDict) -> int:
    """Number of classes of the classifier in a state dict; 0 without one."""
    heads = (weights.get(f"{head}.weight") for head in ("head", "head.fc"))
    return next((len(head) for head in heads if head is not None and head.ndim), 0)


def check_fit(model: nn.Module, weights: StateDict, may_lack: set[str]) -> None:
    """Raises CheckpointError that names all weights that the model cannot take. may_lack: names that may be missing."""
    target = model.state_dict()
    both = [name for name in target if name in weights]
    misfits = [
        f"{name} {tuple(weights[name].shape)} for {tuple(target[name].shape)}"
        for name in both
        if weights[name].shape != target[name].shape
    ]
    kinds = [name for name in both if weights[name].is_floating_point() != target[name].is_floating_point()]
    problems = {
        "missing": [name for name in target if name not in weights and name not in may_lack],
        "not in the model": [shown(name)[1:-1] for name in weights if name not in target],
        "of another shape": misfits,
        "of another type": kinds,
    }
    listed = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in problems.items()
        if names
    ]
    if listed:
        whose = next((whose for name, whose in FOREIGN.items() if any(re.match(name, n) for n in weights)), None)
        reason = f"they are {whose}" if whose else f"another architecture, size or form? {'; '.join(listed)}"
        raise CheckpointError(f"the weights do not fit the model: {reason}")
    if bad := not_finite(model, weights):
        raise CheckpointError(f"the weights are damaged, or training went wrong: {bad} holds NaN or infinity")


def grid_of(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches that a model has position embeddings for."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return tuple(grid) if grid is not None and getattr(model, "pos_embed", None) is not None else None


def fit_pos_embed(model: nn.Module, weights: StateDict, described: tuple[int, int] | None) -> list[str]:
    """Interpolates weights["pos_embed"] to the model's grid if it has another one; notes for the user.

    described: the weights' grid, where they come with a description. Else it is taken to be the model's, or a square
    if the number of patches differs. A bare file does not state it, but trained embeddings show it.
    """
    source, target, wanted = weights.get("pos_embed"), getattr(model, "pos_embed", None), grid_of(model)
    if source is None or wanted is None or source.ndim != 3 or source.shape[::2] != target.shape[::2]:
        return []
    num_prefix = target.shape[1] - math.prod(wanted)  # prefix tokens need not have a position
    num_patches = source.shape[1] - num_prefix
    grid, notes = described, []
    if grid is None or math.prod(grid) != num_patches:
        grid = wanted if num_patches == math.prod(wanted) else (math.isqrt(max(0, num_patches)),) * 2
        if math.prod(grid) != num_patches or num_patches == 0:
            return []  # it does not fit, as the comparison of shapes will report
        if doubt := doubt_of(source[0, num_prefix:], grid):
            notes.append(f"position embeddings of {num_patches} patches taken as {text_of(grid)}{doubt}")
    if grid != wanted:
        weights["pos_embed"] = resample(source, num_prefix, grid, wanted)
        notes.append(
            f"position embeddings interpolated from {text_of(grid)} to {text_of(wanted)} patches{pixels(model, grid)}"
        )
    return notes


def resample(positions: Tensor, num_prefix: int, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """(1, P+N, C) position embeddings of a grid of patches -> those of another.

    As timm's resample_abs_pos_embed, which before timm 1.0.28 does nothing where only the grid's shape differs.
    """
    patches = positions[:, num_prefix:].float().transpose(1, 2).unflatten(2, grid)
    patches = F.interpolate(patches, size=wanted, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :num_prefix], patches.to(positions.dtype)], dim=1)


def pixels(model: nn.Module, grid: tuple[int, int]) -> str:
    """For the note: the image size that weights of this grid are for, if the model knows its own."""
    side = getattr(model.patch_embed, "img_size", None) or getattr(getattr(model, "spec", None), "img_size", None)
    if side is None:
        return ""
    now = two_sides(side)
    patch = [size // own for size, own in zip(now, grid_of(model), strict=True)]
    before = tuple(count * size for count, size in zip(grid, patch, strict=True))
    before, now = (text_of(one_side(size)) for size in (before, now))
    return f": weights for {before} px, used at {now} px"


def doubt_of(embeddings: Tensor, grid: tuple[int, int]) -> str | None:
    """What speaks against this grid of (N, C) position embeddings; None if neighbours in it are most alike."""
    count = len(embeddings)
    grids = [(rows, count // rows) for rows in range(2, count // 2 + 1) if count % rows == 0]
    if grid not in grids:  # a single row, or one patch
        return None
    unit = F.normalize(embeddings.float() - embeddings.float().mean(0), dim=-1)
    likeness = {shape: neighbour_likeness(unit.reshape(*shape, -1)) for shape in grids}
    likeliest = max(grids, key=likeness.__getitem__)
    if likeness[likeliest] < CONFIRMED:
        return ", which nothing in the weights confirms"
    return None if likeliest == grid else f", though they look like {text_of(likeliest)}"


def neighbour_likeness(unit: Tensor) -> float:
    """Mean cosine of neighbours, in rows and in columns, among (rows, columns, C) vectors of length 1."""
    along, across = (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(), (unit[1:] * unit[:-1]).sum(-1).mean()
    return float(along + across) / 2
