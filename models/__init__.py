from .factory import ARCHS, create_model, geometric_keep_rates
from .lvvit import combine_heads
from .pretrained import CheckpointError, find_weights, load_weights, read_checkpoint
from .pruning import Teacher, make_dynamic

__all__ = [
    "ARCHS",
    "CheckpointError",
    "Teacher",
    "combine_heads",
    "create_model",
    "find_weights",
    "geometric_keep_rates",
    "load_weights",
    "make_dynamic",
    "read_checkpoint",
]
