"""Models that differ in their stages and have the same weights: what a dynamic model is compared with."""

from torch import nn

from .factory import build_model
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
    other = build_model(spec).to(first.device, first.dtype)
    known = {name: weights[name] for name in other.state_dict().keys() & weights.keys()}
    other.load_state_dict(known, strict=False, assign=share)
    return other.eval()
