from .factory import ARCHS, build_model, create_model, geometric_keep_rates, gives_embeddings, make_dynamic
from .lvvit import combine_heads
from .pretrained import find_weights, load_weights, read_checkpoint
from .reducers import REDUCERS
from .saved import from_pretrained, looks_like_saved, save_pretrained
from .scorers import SCORERS
from .spatial import arithmetic_keep_rates
from .spec import CheckpointError, ModelError, ModelSpec, Preprocessing
from .teacher import Teacher, build_teacher
from .version import __version__

__all__ = [
    "ARCHS",
    "REDUCERS",
    "SCORERS",
    "CheckpointError",
    "ModelError",
    "ModelSpec",
    "Preprocessing",
    "Teacher",
    "__version__",
    "arithmetic_keep_rates",
    "build_model",
    "build_teacher",
    "combine_heads",
    "create_model",
    "find_weights",
    "from_pretrained",
    "geometric_keep_rates",
    "gives_embeddings",
    "load_weights",
    "looks_like_saved",
    "make_dynamic",
    "read_checkpoint",
    "save_pretrained",
]
