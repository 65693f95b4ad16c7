"""What every dynamic model has, whatever its family: a description that stays true, rates that are checked, and the
behaviour of the timm model that it was made from."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .describe import data_config, describe
from .rates import check_keep_rates
from .reducers import Reducer
from .scorers import Scorer
from .spec import ModelSpec


@dataclass(frozen=True)
class Plan:
    """Where a backbone's tokens are reduced, how and how far."""

    pruning_loc: tuple[int, ...]
    keep_rates: tuple[float, ...]
    scorer: Scorer
    reducer: Reducer
    place: str = "before"
    merge_streams: bool = False


class Dynamic:
    """Mixin in front of a backbone's own class; see families.make_dynamic."""

    mixin: type  # this one's subclass, and the class that the backbone had, to build the joined class again
    backbone_class: type[nn.Module]
    pruning_loc: tuple[int, ...]
    scorer: Scorer
    reducer: Reducer
    all_outputs = False  # what forward gives in train mode: see set_distilled_training

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """Share of the original patch tokens kept after each stage. Setting it raises ValueError if it does not fit."""
        return self._keep_rates

    @keep_rates.setter
    def keep_rates(self, keep_rates: Sequence[float]) -> None:
        self._keep_rates = self.check_rates(keep_rates, len(self.pruning_loc))

    def set_keep_rates(self, keep_rates: Sequence[float]) -> None:
        """The same as keep_rates = ..., as a method."""
        self.keep_rates = keep_rates

    @staticmethod
    def check_rates(keep_rates: Sequence[float], num_stages: int) -> tuple[float, ...]:
        return check_keep_rates(keep_rates, num_stages)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether forward gives, in train mode, all that the losses of this project need: (logits, tokens, keep_mask,
        keep_decisions). Off, as after make_dynamic, it gives logits, as timm's models do."""
        self.all_outputs = enable

    @property
    def spec(self) -> ModelSpec:
        """The description of the model as it is now; timm's setters may have changed it since it was built."""
        return describe(self)

    @spec.setter
    def spec(self, spec: ModelSpec) -> None:
        self.built_as = spec

    @property
    def data_config(self) -> dict[str, Any]:
        """What timm.data.create_transform takes for the model's preprocessing."""
        return data_config(self.spec)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.spec.class_names

    def __reduce_ex__(self, protocol: int) -> tuple:
        return rebuild, (self.mixin, self.backbone_class), dict(self.__dict__)

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            "torch.jit.script does not work on a dynamic model: use torch.export, or torch.jit.trace"
        )

    @staticmethod
    def refuse_tracing(images: Tensor) -> None:
        """A one-line error for torch.fx and what is built on it, which would otherwise fail somewhere inside."""
        if isinstance(images, torch.fx.Proxy):
            raise NotImplementedError(
                "torch.fx cannot trace a dynamic model, whose passes depend on its settings: use forward_intermediates"
            )


@functools.cache
def dynamic_class(mixin: type, backbone_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a dynamic model: the mixin in front of its backbone's own."""
    members = {"mixin": mixin, "backbone_class": backbone_class}
    return type(f"Dynamic{backbone_class.__name__}", (mixin, backbone_class), members)


def rebuild(mixin: type, backbone_class: type[nn.Module]) -> nn.Module:
    """For pickle, which cannot find a class that was made at run time."""
    joined = dynamic_class(mixin, backbone_class)
    return joined.__new__(joined)


def check_not_dynamic(backbone: nn.Module) -> None:
    if isinstance(backbone, Dynamic):
        raise ValueError(
            "the model is already dynamic, as make_dynamic changes a model in place: start from the dense one "
            "(keep a copy.deepcopy of it), or change this one's rates with set_keep_rates"
        )


def check_own_methods(backbone: nn.Module, mixin: type) -> None:
    """Raises ValueError where the backbone's forward pass is not timm's, as the dynamic one would bypass it."""
    check_not_dynamic(backbone)
    for name in ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers"):
        if name in vars(backbone):
            raise ValueError(
                f"this model's {name} is wrapped, and the wrapping would be lost: call make_dynamic before wrapping it"
            )
        method = getattr(type(backbone), name, None)
        module = getattr(method, "__module__", None) or ""
        ours = mixin.__module__.rpartition(".")[0]
        if method is not None and not module.startswith(("timm.", "torch.", f"{ours}.")):
            raise ValueError(
                f"{type(backbone).__name__} has a {name} of its own, which a dynamic model's would replace: "
                "do that work in a module around the model"
            )
