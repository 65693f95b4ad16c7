"""The model card that is published beside a model: README.md, with the header that the Hugging Face hub reads."""

from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

from .reducers import REDUCERS
from .spec import ModelSpec, text_of

CARD_MARK = "<!-- Written by save_pretrained, anew each time; remove this line to keep your changes. -->"


def model_card(spec: ModelSpec, name: str, notes: Mapping[str, Any], origin: str | None = None) -> str:
    """What the model is, what it is based on, what was measured of it (notes), and how to use it.

    name: the folder's or user/name, by which from_pretrained loads it. notes: see save_pretrained; of these
    "license" goes into the header, in place of that of timm's weights. origin: of a transformers model, the name on
    the hub that it comes from, or an empty one.
    """
    # An architecture's name alone, without the tag of weights, says nothing of where the weights are from.
    base = get_pretrained_cfg(spec.arch, allow_unregistered=True) if "." in spec.arch else None
    notes = dict(notes)
    features = notes.get("purpose") == "features"
    licence = notes.pop("license", None) or (base and base.license)
    header = {
        "library_name": "dynamicvit",
        "pipeline_tag": "image-classification" if spec.num_classes and not features else "image-feature-extraction",
        "base_model": origin or (base and base.hf_hub_id),
        "license": licence,
    }
    lines = ["---", *(f"{key}: {value}" for key, value in header.items() if value), "tags:"]
    lines += [f"- {tag}" for tag in ("vision-transformer", "dynamicvit", *(() if spec.dense else (spec.reducer,)))]
    lines += ["---", CARD_MARK, "", f"# {name}", "", what_it_is(spec), ""]
    if features:
        lines += ["It is for features, one for every patch; its own predictions were not evaluated.", ""]
    if notes:
        lines += ["| | |", "|---|---|", *rows(notes), ""]
    result, call, part = ("logits" if spec.num_classes else "embedding"), "model", ""
    if features:
        result, call = "tokens", "model.forward_features"
    elif origin is not None:
        result, part = ("logits", ".logits") if spec.num_classes else ("tokens", ".last_hidden_state")
    lines += [
        "```python",
        "import dynamicvit, timm.data",
        f'model = dynamicvit.from_pretrained("{name}")',
        "transform = timm.data.create_transform(**model.data_config)",
        f"{result} = {call}(transform(image)[None]){part}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def what_it_is(spec: ModelSpec) -> str:
    outputs = f"{spec.num_classes} classes" if spec.num_classes else "embeddings"
    dense = f"{spec.arch}, {text_of(spec.img_size)} px, {outputs}"
    if spec.dense:
        return f"{dense}."
    blocks = ", ".join(map(str, spec.pruning_loc))
    rates = ", ".join(f"{rate:.3g}" for rate in spec.keep_rates)
    merges = spec.reducer in REDUCERS and REDUCERS[spec.reducer].merges
    does = "merges patches with those most similar to them" if merges else "drops patches"
    return (
        f"{dense}, made faster by DynamicViT: from block to block it {does}, chosen image by image "
        f"(scorer {spec.scorer}, reducer {spec.reducer}). {spec.place.capitalize()} blocks {blocks} it "
        f"keeps these shares of all patches: {rates}."
    )


def rows(notes: Mapping[str, Any], before: str = "") -> list[str]:
    """Of a table: a row for each note, and for each entry of a note that is a dict."""
    lines = []
    for key, value in notes.items():
        name = f"{before}{key}"
        lines += rows(value, f"{name}: ") if isinstance(value, Mapping) else [f"| {cell(name)} | {cell(value)} |"]
    return lines


def cell(value: Any) -> str:
    """For a table: on one line, without what ends a cell, numbers with four digits."""
    value = f"{value:.4g}" if isinstance(value, float) else value
    return " ".join(str(value).replace("|", "/").split())
