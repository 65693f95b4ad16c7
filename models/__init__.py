from dynamicvit.models.factory import (
    ARCHS,
    build_model,
    create_model,
    geometric_keep_rates,
    gives_embeddings,
    make_dynamic,
)
from dynamicvit.models.lvvit import combine_heads
from dynamicvit.models.pretrained import find_weights, load_weights, read_checkpoint
from dynamicvit.models.reducers import REDUCERS
from dynamicvit.models.saved import from_pretrained, looks_like_saved, save_pretrained
from dynamicvit.models.scorers import SCORERS
from dynamicvit.models.spatial import arithmetic_keep_rates
from dynamicvit.models.spec import CheckpointError, ModelError, ModelSpec, Preprocessing
from dynamicvit.models.teacher import Teacher, build_teacher
from dynamicvit.models.version import __version__

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
