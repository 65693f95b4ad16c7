"""Models that differ in their stages and have the same weights: what a dynamic model is compared with."""

from torch import nn

from . import huggingface
from .factory import build_model
from .families import make_dynamic
from .spec import ModelSpec


def dense_twin(model: nn.Module, share: bool = False) -> nn.Module:
    """The plain backbone of a model that has a spec, with its weights, on its device, in eval mode.

    share: whether the weights are the model's own tensors, so that they take no more memory and change with it.
    """
    return twin(model, model.spec.as_dense(), share)


def twin(model: nn.Module, spec: ModelSpec, share: bool = False) -> nn.Module:
    """As dense_twin, for another description of the same backbone; what the model lacks stays as it was built."""
    weights = model.state_dict()
    first = next(model.parameters())
    other = new_model(model, spec).to(first.device, first.dtype)
    known = {name: weights[name] for name in other.state_dict().keys() & weights.keys()}
    other.load_state_dict(known, strict=False, assign=share)
    return other.eval()


def new_model(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """With fresh weights; a transformers model cannot be built from its spec alone."""
    if not isinstance(model, huggingface.PreTrainedVisionModel):
        return build_model(spec)
    dense = huggingface.new_dense(model)
    if spec.dense:
        return dense
    return make_dynamic(dense, spec.pruning_loc, spec.keep_rates, spec.scorer, spec.reducer, place=spec.place)
