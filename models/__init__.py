from .factory import ARCHS, build_model, create_model, geometric_keep_rates, make_dynamic
from .lvvit import combine_heads
from .pretrained import CheckpointError, find_weights, load_weights, read_checkpoint
from .reducers import REDUCERS
from .scorers import SCORERS
from .spatial import arithmetic_keep_rates
from .spec import ModelError, ModelSpec, Preprocessing
from .teacher import Teacher

__all__ = [
    "ARCHS",
    "REDUCERS",
    "SCORERS",
    "CheckpointError",
    "ModelError",
    "ModelSpec",
    "Preprocessing",
    "Teacher",
    "arithmetic_keep_rates",
    "build_model",
    "combine_heads",
    "create_model",
    "find_weights",
    "geometric_keep_rates",
    "load_weights",
    "make_dynamic",
    "read_checkpoint",
]
