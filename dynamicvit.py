"""DynamicViT: trained vision transformers made faster by keeping, image by image, only the tokens that tell something.

What `dynamicvit.models` offers stands here too; it is loaded when it is first asked for, so that commands start fast.

Installed, this file is the package's __init__. In a clone the root is the package, without being installed: there
`python main_dynamic_vit.py`, `python -m tools.accelerate` and `from models import create_model` work as they are, and
are the very modules that `import dynamicvit` gives.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamicvit.models import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__version__":
        raise AttributeError(name)
    if name == "accelerate":
        return importlib.import_module("dynamicvit.tools.accelerate").accelerate
    models = importlib.import_module("dynamicvit.models")
    if name not in models.__all__:
        raise AttributeError(f"module 'dynamicvit' has no attribute {name!r}")
    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted(["accelerate", *importlib.import_module("dynamicvit.models").__all__])


class ShortNames(MetaPathFinder, Loader):
    """Makes `models` another name of `dynamicvit.models`, and so on: one module, whichever name it is imported by."""

    root = Path(__file__).resolve().parent
    folders = ("data", "models", "runs", "tools")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.startswith("dynamicvit"):
            return None
        found = PathFinder.find_spec(name, path)
        if found is None or not found.origin:
            return None
        folder = Path(found.origin).resolve().parent
        is_ours = folder == self.root or (folder.parent == self.root and folder.name in self.folders)
        return ModuleSpec(name, self) if is_ours else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an empty one, which exec_module replaces

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(f"dynamicvit.{module.__name__}")


if Path(__file__).name == "dynamicvit.py":
    __path__ = [str(ShortNames.root)]
    sys.meta_path.insert(0, ShortNames())
