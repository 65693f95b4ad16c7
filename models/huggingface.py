"""Vision models of Hugging Face's transformers: ViT, DeiT, DINOv2 (with registers), SigLIP and CLIP.

Their own forward methods run, so that their outputs keep their class, names and shapes. Hooks before the encoder's
layers shorten the sequence, a registered attention function adds the bias for merged tokens and shows the scorer
queries and keys, and a hook after the last layer gives every patch its token back. Shapes: B images, P prefix tokens
(class token first), N patch tokens, K of them left, C channels.
"""

import copy
import functools
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from .blocks import Tokens
from .describe import describe
from .dynamic import Dynamic, Plan, check_not_dynamic
from .pruning import (
    Forward,
    TokenPruning,
    Trace,
    aligned,
    bias_dtype,
    policy_bias,
    sample_keep_decision,
    spread_scores,
    trace_groups,
)
from .rates import check_keep_rates, geometric_keep_rates
from .restoring import RESTORE, Restorer
from .scorers import Attention
from .spec import (
    CheckpointError,
    ModelError,
    ModelSpec,
    Preprocessing,
    first_line,
    one_side,
    plain,
    two_sides,
)
from .version import __version__
from .vit import ViTAdapter

HALF = (0.5, 0.5, 0.5)
SQUASH = "squash"
IMAGENET = Preprocessing(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
# What a kind of model expects where no preprocessor_config.json says it: what its first published weights expect.
KINDS = {
    "vit": Preprocessing(HALF, HALF, 1.0, "bilinear", SQUASH),
    "deit": replace(IMAGENET, crop_mode=SQUASH),
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "siglip": Preprocessing(HALF, HALF, 1.0, "bicubic", SQUASH),
    "clip": Preprocessing(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, 1.0, "bicubic"),
}
MODEL_TYPES = {kind: kind for kind in KINDS} | {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers
CONFIG, PROCESSOR, ENTRY = "config.json", "preprocessor_config.json", "dynamicvit"
ATTENTIONS = {"dynamicvit_sdpa": "sdpa", "dynamicvit_eager": "eager"}  # ours, and what each one is in a dense model
PREDICTORS = "score_predictor."
ANSWERS = ("logits", "image_embeds", "pooler_output")  # what a model is for: the first of these that it gives


def kind_of(model_class: type) -> str | None:
    """Which of KINDS it is, by the module that it or a base class is from; nothing has to be imported for it."""
    for base in model_class.__mro__:
        package, _, rest = base.__module__.partition(".models.")
        kind = rest.partition(".")[0]
        if package == "transformers" and kind in KINDS:
            return kind
    return None


class ByModule(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return kind_of(type(instance)) is not None


class PreTrainedVisionModel(metaclass=ByModule):
    """Stands for transformers' classes, which only their users import."""


class Parts(NamedTuple):
    """The parts of a model, which its classes keep in different places."""

    tower: nn.Module  # has the embeddings; answers with last_hidden_state first
    layers: nn.ModuleList
    callers: tuple[nn.Module, ...]  # from the model itself to what calls the layers


def parts_of(model: nn.Module) -> Parts:
    """Raises ValueError for what is not an image model."""
    name = type(model).__name__
    if hasattr(model, "text_model"):
        raise ValueError(f"{name} reads text, too: make its vision_model dynamic, if that is a model of its own")
    if not hasattr(model, "save_pretrained") or getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{name} is not a complete image model of transformers")
    path, layers = next((path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList))
    steps = path.split(".")
    callers = tuple(model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps)))
    tower = next(caller for caller in callers if hasattr(caller, "embeddings"))
    if not hasattr(sys.modules[type(layers[0]).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(f"{name} takes no attention functions in this version of transformers: install a newer one")
    return Parts(tower, layers, callers)


def tower_features(model: nn.Module, images: Tensor) -> Tensor:
    return parts_of(model).tower(images)[0]


def vision_config(model: nn.Module) -> Any:
    return getattr(model.config, "vision_config", model.config)


def answer_of(output: Any) -> Tensor:
    """(B, classes) logits from a model's output, or (B, C) embeddings where it has no classes.

    A tensor, which all other models return, stays as it is. Raises ModelError for what is neither.
    """
    if isinstance(output, Tensor):
        return output
    for name in ANSWERS:
        if getattr(output, name, None) is not None:
            return output[name]
    if getattr(output, "last_hidden_state", None) is None:
        raise ModelError(f"a {type(output).__name__} has neither logits nor an embedding: use a model that returns one")
    return output.last_hidden_state.mean(dim=1)


# --- One pass, which hooks and attention functions share


@dataclass
class Pass:
    """One call of a dynamic model: what it has to return, and its state so far."""

    model: "DynamicVision"
    callers: list[nn.Module] = field(default_factory=list)  # those running now
    wants_states: bool = False  # output_hidden_states
    tokens: Tokens | None = None  # None: no layer is running
    forward: Forward = field(default_factory=lambda: Forward([], head_alone=False))
    attention: Attention | None = None  # of the layer before a stage
    attended: bool = False  # whether the layer that runs has called our attention function
    keep_decisions: list[Tensor] = field(default_factory=list)  # of masked training, as in TokenPruning.forward
    features: Tensor | None = None  # (B, P+N, C) last_hidden_state
    states: list[Tensor] = field(default_factory=list)  # restored, after each layer, if they are wanted

    def start(self, x: Tensor) -> None:
        """x: (B, P+N, C), the tokens before the first layer."""
        model = self.model
        if model.restore not in RESTORE:
            raise ValueError(f"restore must be one of {', '.join(RESTORE)}; got {model.restore!r}")
        unread = model.reads_class_token_alone and self.callers[:1] == [model]
        unread = unread and not self.wants_states and not model.all_outputs
        restorer = None if unread or model.restore == "none" else Restorer(model.restore)
        self.forward = Forward([], head_alone=False, restorer=restorer)
        self.tokens, self.keep_decisions, self.attention, self.states = Tokens(x), [], None, []

    def enter(self, number: int, x: Tensor) -> Tensor:
        """(B, P+K, C) tokens -> those that the layer is to take."""
        if number == 0:
            self.start(x)
        elif not self.wants_states:  # or x is restored
            self.tokens.x = x
        self.attended = False
        if number in self.model.pruning_loc:
            stage = self.model.pruning_loc.index(number)
            if self.model.training and self.model.hides:
                self.hide(stage)
            else:
                self.model.shorten(self.forward)(stage, self.tokens)
        return self.tokens.x

    def hide(self, stage: int) -> None:
        """Masked training, as TokenPruning.forward_masked."""
        model, tokens = self.model, self.tokens
        patch_tokens = tokens.x[:, model.num_prefix_tokens :]
        ones = patch_tokens.new_ones(patch_tokens.shape[:2], dtype=torch.float32)
        policy = self.keep_decisions[-1] if self.keep_decisions else ones
        log_probs = model.scorer.log_probabilities(model.score_predictor[stage], patch_tokens, policy)
        policy = policy * sample_keep_decision(log_probs)
        self.keep_decisions.append(policy)
        tokens.bias = aligned(policy_bias(policy, model.num_prefix_tokens).to(bias_dtype(tokens.x)))

    def leave(self, number: int, x: Tensor) -> Tensor:
        """(B, P+K, C) tokens after a layer -> the same, or (B, P+N, C) where others look at them."""
        if not self.attended:
            raise ValueError("this version of transformers does not take attention functions: install a newer one")
        self.tokens.x = x
        is_last = number == self.model.num_layers - 1
        if self.forward.restorer and (is_last or self.wants_states):
            x = self.forward.restorer(x, self.model.num_prefix_tokens)
        if self.wants_states:
            self.states.append(x)
        return x

    def put_states(self, output: Any) -> None:
        """Restored states into an answer: some versions of transformers record them inside the layers."""
        found = getattr(output, "hidden_states", None)
        if found and len(found) == len(self.states) + 1:
            states = [None if state is None else ours for state, ours in zip(found[1:], self.states, strict=True)]
            if found[-1] is output.get("last_hidden_state"):  # the normed one
                states[-1] = found[-1]
            output["hidden_states"], self.states = (found[0], *states), []  # the caller passes these on

    def observe(self, number: int, queries: Tensor, keys: Tensor, scale: float) -> None:
        model = self.model
        if number + 1 in model.pruning_loc and model.scorer.reads_attention(model.adapter.has_class_token(model)):
            self.attention = Attention(queries, keys, scale, lambda x: x)

    def keep_mask(self) -> Tensor:
        """(B, N), 1 for the patches kept after the last stage."""
        if self.keep_decisions:
            return self.keep_decisions[-1].detach()
        stages = self.forward.stages
        return torch.zeros_like(stages[0].scores, dtype=torch.float32).scatter(1, stages[-1].patches, 1.0)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether layers run again in the backward pass, where the pass that they were part of is over."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


class Passes(threading.local):
    """The pass of this thread, as threads may share a model."""

    current: Pass | None = None
    layer: int | None = None
    watched: list[Pass] | None = None  # where a finished pass is left for whoever asked for it


_passes = Passes()


def before_layer(number: int, _layer: nn.Module, args: tuple) -> tuple | None:
    if _passes.current is None:  # a layer is called by itself
        return None
    _passes.layer = number
    return (_passes.current.enter(number, args[0]), *args[1:])


def after_layer(number: int, _layer: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
    """Before transformers 5 some layers return tuples."""
    if _passes.current is None:
        return None
    _passes.layer = None
    if isinstance(output, tuple):
        return (_passes.current.leave(number, output[0]), *output[1:])
    return _passes.current.leave(number, output)


def attend(
    dense: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: the dense one, with the bias of the pass.

    (B, H, M, D) queries, keys and values -> (B, M, H, D), and the weights if dense is eager.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    run, number = _passes.current, _passes.layer
    if run is not None and number is not None:
        if attention_mask is not None:
            raise ValueError("a dynamic model makes its own masks: leave attention_mask and head_mask out")
        run.attended, attention_mask = True, run.tokens.bias
        run.observe(number, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    mixed = attention_mask is not None and attention_mask.dtype != query.dtype  # see pruning.bias_dtype
    if dense == "sdpa" and not mixed:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    weights = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def register_attention() -> None:
    """Makes transformers know our attention functions by their names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register = getattr(ALL_ATTENTION_FUNCTIONS, "register", ALL_ATTENTION_FUNCTIONS.__setitem__)
    for name, dense in ATTENTIONS.items():
        register(name, functools.partial(attend, dense))


# --- The dynamic model


class DynamicVision(Dynamic):
    """Mixin in front of a transformers model's own class, whose name it keeps: files, pipelines and the record of
    hidden states go by it."""

    keeps_map, merge_streams, tokens_are_logits = False, False, False
    adapter: "HuggingFaceAdapter"
    num_layers: int
    num_prefix_tokens: int
    place: str
    restore: str
    score_predictor: nn.ModuleList
    # what needs nothing but the names above
    tokens_kept, hides = TokenPruning.tokens_kept, TokenPruning.hides
    shorten, look = TokenPruning.shorten, TokenPruning.look
    combine = staticmethod(lambda logits, tokens: logits)  # what labels are compared with

    @Dynamic.keep_rates.setter
    def keep_rates(self, keep_rates: Sequence[float]) -> None:
        """Also in the config, so that save_pretrained has them."""
        self._keep_rates = check_keep_rates(keep_rates, len(self.pruning_loc))
        stages = {"pruning_loc": list(self.pruning_loc), "keep_rates": list(self._keep_rates), "place": self.place}
        names = {"scorer": self.scorer.name, "reducer": self.reducer.name}
        setattr(self.config, ENTRY, stages | names | {"version": __version__})

    def __reduce_ex__(self, protocol: int) -> tuple:
        return rebuild, (self.backbone_class,), dict(self.__dict__)

    @property
    def reads_class_token_alone(self) -> bool:
        """Whether nothing reads a patch token after the last layer."""
        classifies = "ForImageClassification" in self.backbone_class.__name__
        return classifies and kind_of(self.backbone_class) in ("vit", "deit")

    def forward_pruned(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) images -> logits (or embeddings), and by stage the (B, K) patches kept, best score first."""
        output, run = self.watch(images)
        return answer_of(output), [stage.patches for stage in run.forward.stages]

    def trace(self, images: Tensor) -> Trace:
        """forward_pruned, with the scores and with what merged into what."""
        output, run = self.watch(images)
        stages = run.forward.stages
        kept = [stage.patches for stage in stages]
        return Trace(answer_of(output), kept, spread_scores(stages), trace_groups(stages), self.grid(images))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches that images of this size have."""
        patch = two_sides(vision_config(self).patch_size)
        return tuple(side // step for side, step in zip(images.shape[-2:], patch, strict=True))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, P+N, C) tokens, one for every patch, as timm's models give them: last_hidden_state."""
        return tower_features(self, images)

    def watch(self, images: Tensor) -> tuple[Any, Pass]:
        _passes.watched = []
        try:
            output = self(images, return_dict=True)
            return output, _passes.watched[-1]
        finally:
            _passes.watched = None

    # --- hooks on the modules that call the layers

    def begin(self, caller: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        run, is_whole = _passes.current, isinstance(caller, DynamicVision)
        # DataParallel's copies have the hooks of the model that they are copies of
        goes_on = run is not None and run.model.stage_hooks is self.stage_hooks and run.callers
        if is_whole or not goes_on or caller in run.callers:
            run = _passes.current = Pass(caller if is_whole else self)
            _passes.layer = None
        run.callers.append(caller)
        use_our_attention(run.model)
        if run.model.training and torch.is_grad_enabled() and is_checkpointing(run.model):
            raise ValueError(
                "stages do not work with gradient checkpointing: call model.gradient_checkpointing_disable()"
            )
        wants = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        config = getattr(caller, "config", None)
        wants = {name: getattr(config, name, False) if value is None else value for name, value in wants.items()}
        if wants["output_attentions"]:
            raise ValueError(
                "a dynamic model's attention has a different size in each layer: leave output_attentions out"
            )
        run.wants_states |= wants["output_hidden_states"] is not None and wants["output_hidden_states"] is not False

    def end(self, caller: nn.Module, _args: tuple, output: Any) -> Any:
        """Runs after errors, too; output is None then."""
        run = _passes.current
        if run is None or not run.callers or run.callers[-1] is not caller:
            return None
        run.callers.pop()
        if output is not None:
            run.put_states(output)
            run.features = output[0] if hasattr(caller, "embeddings") else run.features
        if run.callers:
            return None
        _passes.current = _passes.layer = None
        if output is None:
            return None
        if _passes.watched is not None:
            _passes.watched.append(run)
        if not (run.model.training and run.model.all_outputs and caller is run.model):
            return None
        tokens = run.features[:, run.model.num_prefix_tokens :]
        return answer_of(output), tokens, run.keep_mask(), run.keep_decisions


def use_our_attention(model: DynamicVision) -> None:
    """Also after set_attn_implementation has chosen another one. Raises ValueError for a kernel that takes no bias."""
    for config in model.attention_configs:
        chosen = config._attn_implementation or "eager"
        if chosen not in ATTENTIONS:
            config._attn_implementation = ours(chosen)


def ours(dense: str) -> str:
    """The name of our attention function for a dense one's."""
    for name, known in ATTENTIONS.items():
        if dense == known:
            return name
    raise ValueError(f"{dense} takes no bias for merged tokens: call model.set_attn_implementation('sdpa')")


@functools.cache
def dynamic_class(backbone_class: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(backbone_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = names | {"mixin": DynamicVision, "backbone_class": backbone_class}
    return type(backbone_class.__name__, (DynamicVision, backbone_class), members)


def rebuild(backbone_class: type[nn.Module]) -> nn.Module:
    """For pickle, maybe in a process that has not made anything dynamic yet."""
    register_attention()
    joined = dynamic_class(backbone_class)
    return joined.__new__(joined)


class HuggingFaceAdapter:
    """For all of KINDS, with and without a classifier or a projection."""

    backbone = PreTrainedVisionModel
    recipe = "neurips"
    takes_img_size = False
    keep_rates = staticmethod(geometric_keep_rates)
    default_pruning_loc = ViTAdapter.default_pruning_loc

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return parts_of(model).layers

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """(height, width) of the images that the model is used for: some position tables are larger."""
        return two_sides(describe(model).img_size)

    def map_published(self, weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return weights

    def outputs_of(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of a dense model: logits (or embeddings), and its (B, N, C) patch tokens."""
        features: list[Tensor] = []
        parts = parts_of(model)
        hook = parts.tower.register_forward_hook(lambda _tower, _args, output: features.append(output[0]))
        try:
            answer = answer_of(model(images, return_dict=True))
        finally:
            hook.remove()
        return answer, features[-1][:, self.count_prefix(parts) :]

    def has_class_token(self, model: nn.Module) -> bool:
        return model.num_prefix_tokens > 0

    def count_prefix(self, parts: Parts) -> int:
        """Tokens before the patches: class and distillation token, registers."""
        names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
        tokens = [getattr(parts.tower.embeddings, name, None) for name in names]
        return sum(1 if token.ndim < 3 else token.shape[1] for token in tokens if token is not None)

    def observed(self, model: nn.Module, i: int, tokens: Tokens) -> list[Attention]:
        return [_passes.current.attention]

    def make_dynamic(self, model: nn.Module, plan: Plan) -> nn.Module:
        check_not_dynamic(model)
        parts = parts_of(model)
        depth, loc = len(parts.layers), plan.pruning_loc
        if not loc or list(loc) != sorted(set(loc)) or not all(1 <= i < depth for i in loc):
            raise ValueError(f"pruning stages must be ascending layer numbers in 1..{depth - 1}, got {loc}")
        if plan.place != "before":
            raise ValueError(
                f"stages of a transformers model are before its layers; place {plan.place!r} needs a timm model"
            )
        keep_rates = check_keep_rates(plan.keep_rates, len(loc))
        configs = {id(c): c for part in parts.layers.modules() if (c := vars(part).get("config")) is not None}
        for config in configs.values():
            if config._attn_implementation not in ATTENTIONS:
                ours(config._attn_implementation or "eager")
        self.change(model, parts, plan, keep_rates)
        return model

    def change(self, model: nn.Module, parts: Parts, plan: Plan, keep_rates: tuple[float, ...]) -> None:
        """All checks have passed."""
        register_attention()
        spec = describe(model)
        configs: dict[int, Any] = {}  # copies, so that others made from the same config stay dense
        for part in model.modules():
            if (config := vars(part).get("config")) is not None:
                part.config = copy.deepcopy(config, configs)
        like = next(parts.layers.parameters())
        width = vision_config(model).hidden_size
        modules = [plan.scorer.module(width) for _ in plan.pruning_loc] if plan.scorer.learned else []
        model.__class__ = dynamic_class(type(model))
        model.adapter, model.scorer, model.reducer, model.place = self, plan.scorer, plan.reducer, plan.place
        model.pruning_loc, model.restore, model.num_layers = plan.pruning_loc, "residual", len(parts.layers)
        model.num_prefix_tokens, model.spec = self.count_prefix(parts), spec
        model.set_keep_rates(keep_rates)
        own = {id(c): c for part in parts.layers.modules() if (c := vars(part).get("config")) is not None}
        model.attention_configs = list(own.values())
        model.score_predictor = nn.ModuleList(modules)
        model.score_predictor.apply(init_weights_vit_timm).to(like.device, like.dtype)
        model.stage_hooks = add_hooks(model, parts)  # kept, so that pickle knows which numbers are taken


def add_hooks(model: DynamicVision, parts: Parts) -> list[Any]:
    handles = []
    for caller in parts.callers:
        handles.append(caller.register_forward_pre_hook(model.begin, with_kwargs=True))
        handles.append(caller.register_forward_hook(model.end, always_call=True))
    for number, layer in enumerate(parts.layers):
        handles.append(layer.register_forward_pre_hook(functools.partial(before_layer, number)))
        # first, so that the record of hidden states, which is a hook as well, sees restored ones
        handles.append(layer.register_forward_hook(functools.partial(after_layer, number), prepend=True))
    return handles


# --- Description and files


def spec_of(model: nn.Module) -> ModelSpec:
    """The description of a dense model. Its preprocessing is that of the preprocessor_config.json beside its weights,
    if they came from a folder or from the hub's cache, or what its kind mostly has."""
    config = model.config
    names = None
    if (classes := config.num_labels if hasattr(model, "classifier") or hasattr(model, "cls_classifier") else 0) > 0:
        names = tuple(str(config.id2label[i]) for i in range(classes))
        if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
            names = None
    size = one_side(two_sides(vision_config(model).image_size))
    kind = kind_of(type(model))
    preprocessing, crop = said_preprocessing(model) or (KINDS[kind], None)
    if crop is not None and kind.startswith("dinov2"):  # its table of positions is interpolated
        size = crop
    return ModelSpec(
        type(model).__name__,
        num_classes=classes,
        img_size=size,
        dense=True,
        preprocessing=preprocessing,
        class_names=names,
    )


def said_preprocessing(model: nn.Module) -> tuple[Preprocessing, int | None] | None:
    """What the preprocessor_config.json beside the model's weights says, with the side of its crop; None where there
    is none that can be read."""
    path = find_processor(model.config.name_or_path)
    return path and read_processor(path)


def find_processor(name_or_path: str) -> Path | None:
    if not name_or_path:
        return None
    path = Path(name_or_path) / PROCESSOR
    if path.is_file():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name_or_path, PROCESSOR)
    except Exception:  # not a name on the hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_processor(path: Path) -> tuple[Preprocessing, int | None] | None:
    """What transformers' image processor does, and the side of its crop; None for a file that does not say it."""
    try:
        content = json.loads(path.read_text())
        sides = (content.get("size"), content.get("crop_size") if content.get("do_center_crop", True) else None)
        resized, crop = (side_of(size) for size in sides)
        named = content.get("image_processor_type") or content.get("feature_extractor_type") or ""
        is_vit, size = named.startswith("ViT"), sides[0]
        squashes = "height" in size if isinstance(size, Mapping) else is_vit or named.startswith("DeiT")
        preprocessing = Preprocessing(
            tuple(map(float, content["image_mean"])),
            tuple(map(float, content["image_std"])),
            crop / resized if crop and resized else 1.0,
            PIL_FILTERS[content.get("resample", 2 if is_vit else 3)],
            SQUASH if squashes else "center",
        )
        return preprocessing, crop or resized
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def side_of(size: Any) -> int | None:
    """{"shortest_edge": 256}, {"height": 224, "width": 224} or 224."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else None


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():  # a FIFO would be waited for without end
        return {}
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_saved_by_transformers(folder: str | Path) -> bool:
    """Whether it is a folder that a transformers model's save_pretrained has written."""
    return bool(str(folder)) and "model_type" in read_config(Path(folder))


def save(model: nn.Module, folder: str | Path, class_names: Sequence[str] | None, notes: Mapping[str, Any]) -> None:
    """Saves by the model's own method, with a file on how images are prepared. notes: how it was made, for its config.
    Raises CheckpointError."""
    if class_names is not None:
        if len(class_names) != model.config.num_labels:
            raise CheckpointError(f"{len(class_names)} class names for {model.config.num_labels} classes")
        model.config.id2label = dict(enumerate(class_names))
        model.config.label2id = {name: i for i, name in enumerate(class_names)}
    if notes and isinstance(entry := getattr(model.config, ENTRY, None), Mapping):
        setattr(model.config, ENTRY, {**entry, "notes": json.loads(json.dumps(plain(notes), default=str))})
    processor = processor_text(model)
    try:
        with quiet_transformers():
            model.save_pretrained(str(folder))
        Path(folder, PROCESSOR).write_text(processor, encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot save the model in {folder} ({first_line(error)})") from error


def processor_text(model: nn.Module) -> str:
    """Of a preprocessor_config.json: the one that the model came with, or a new one where that says something else."""
    spec, path = describe(model), find_processor(model.config.name_or_path)
    how, (height, width) = spec.preprocessing, two_sides(spec.img_size)
    if path is not None and (read_processor(path) or [None])[0] == how:
        return path.read_text()
    resized, squashed = [round(side / how.crop_pct) for side in (height, width)], how.crop_mode == SQUASH
    content = {
        "image_processor_type": "CLIPImageProcessor",  # does what timm's transform does
        **{f"do_{step}": True for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")},
        "size": dict(zip(("height", "width"), resized, strict=True)) if squashed else {"shortest_edge": min(resized)},
        "crop_size": {"height": height, "width": width},
        "resample": PIL_FILTERS.index(how.interpolation),
        "rescale_factor": 1 / 255,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    return json.dumps(content, indent=1) + "\n"


def hub_name(model: nn.Module) -> str:
    """Where a model comes from, if that is the hub."""
    name = model.config.name_or_path or ""
    if match := re.search(r"models--([\w.\-]+?)--([\w.\-]+)/snapshots/", name):  # a folder in the hub's cache
        return f"{match[1]}/{match[2]}"
    return name if re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) and not Path(name).exists() else ""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences its progress bars, and its warnings of predictors, which it does not know."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def new_dense(model: nn.Module) -> nn.Module:
    """The dense model that a transformers model is, or was before it was made dynamic, with fresh weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.name_or_path = model.config.name_or_path
    vars(config).pop(ENTRY, None)
    dense = getattr(model, "backbone_class", type(model))(config)
    dense.spec = describe(model).as_dense()
    return dense.eval()


def load_dense(folder: str | Path) -> nn.Module:
    """The dense model of a folder that transformers has written, in eval mode; nothing is downloaded.

    model.config.dynamicvit has the stages, if it was dynamic. Raises CheckpointError for another kind of model.
    """
    content = read_config(Path(folder))
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{folder} is a transformers model: pip install 'transformers>=4.56'") from error
    architecture = next(iter(content.get("architectures") or ["AutoModel"]))
    model_class = getattr(transformers, str(architecture), None)
    is_known = isinstance(model_class, type) and kind_of(model_class) is not None
    if not is_known and not (architecture == "AutoModel" and content["model_type"] in MODEL_TYPES):
        raise CheckpointError(
            f"{folder} has a transformers {architecture}; these can be made dynamic: {', '.join(KINDS)}"
        )
    try:
        with quiet_transformers():
            model = model_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # of any type, by what is missing or does not fit
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({first_line(error)})") from error
    model.spec = spec_of(model)
    return model.eval()


def stages_in(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """What make_dynamic is to be called with, from the config of a loaded model."""
    entry = getattr(model.config, ENTRY, None)
    if not isinstance(entry, Mapping):
        raise CheckpointError(
            f"{folder} has a dense transformers model: make it dynamic with dynamicvit accelerate, or in Python with "
            "make_dynamic(model, speedup=1.6)"
        )
    names = ("pruning_loc", "keep_rates", "scorer", "reducer", "place")
    missing = [name for name in names if name not in entry]
    if missing:
        raise CheckpointError(f"{folder}: no {missing[0]} among the stages in {CONFIG}")
    return {name: entry[name] for name in names}


def load_predictors(model: DynamicVision, folder: str | Path) -> None:
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PREDICTORS)]  # noqa: SIM118
            found |= {name.removeprefix(PREDICTORS): file.get_tensor(name) for name in names}
    try:
        model.score_predictor.load_state_dict(found)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the predictors' weights do not fit the stages in {CONFIG}") from error
