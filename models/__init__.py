from dynamicvit.models.costs import choose_stages
from dynamicvit.models.describe import describe
from dynamicvit.models.factory import ARCHS, build_model, create_model, gives_embeddings
from dynamicvit.models.families import make_dynamic
from dynamicvit.models.lvvit import combine_heads
from dynamicvit.models.pretrained import find_weights, from_pretrained, load_weights, read_checkpoint
from dynamicvit.models.rates import arithmetic_keep_rates, geometric_keep_rates
from dynamicvit.models.reducers import REDUCERS, Reduced, Reducer, Scores
from dynamicvit.models.saved import looks_like_saved, push_to_hub, save_pretrained
from dynamicvit.models.scorers import SCORERS, Look, Scorer
from dynamicvit.models.spec import CheckpointError, ModelError, ModelSpec, Preprocessing
from dynamicvit.models.teacher import Teacher, build_teacher
from dynamicvit.models.version import __version__

__all__ = [
    "ARCHS",
    "REDUCERS",
    "SCORERS",
    "CheckpointError",
    "Look",
    "ModelError",
    "ModelSpec",
    "Preprocessing",
    "Reduced",
    "Reducer",
    "Scorer",
    "Scores",
    "Teacher",
    "__version__",
    "arithmetic_keep_rates",
    "build_model",
    "build_teacher",
    "choose_stages",
    "combine_heads",
    "create_model",
    "describe",
    "find_weights",
    "from_pretrained",
    "geometric_keep_rates",
    "gives_embeddings",
    "load_weights",
    "looks_like_saved",
    "make_dynamic",
    "push_to_hub",
    "read_checkpoint",
    "save_pretrained",
]
