"""The command `dynamicvit`: all commands of the project behind one name.

dynamicvit accelerate vit_small_patch16_224 --images photos/ --output fast/
torchrun --nproc_per_node 8 -m dynamicvit.tools.cli train --arch deit_small ...
"""

import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamicvit.signals import end_on_interrupt

COMMANDS = {  # module, and what it does
    "accelerate": ("dynamicvit.tools.accelerate", "makes a trained ViT faster, from a folder of photos without labels"),
    "predict": ("dynamicvit.tools.predict", "says what a model sees in photos"),
    "export": ("dynamicvit.tools.export", "writes a model as ONNX or torch.export, checked and timed"),
    "sweep": ("dynamicvit.tools.sweep", "compares scorers, reducers and rates on the same photos"),
    "visualize": ("dynamicvit.tools.visualize", "draws which patches leave or become one token"),
    "benchmark": ("dynamicvit.tools.benchmark", "times dynamic models beside their dense backbone"),
    "train": ("dynamicvit.main_dynamic_vit", "trains and evaluates as published; also under torchrun"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        ["usage: dynamicvit COMMAND ...", "", *lines, "", "dynamicvit COMMAND --help tells more; --version the version"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. Only the command that is asked for is imported, as torch takes seconds."""
    if argv is None:
        end_on_interrupt()
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        # Run, not imported, as its package would take torch's seconds.
        file = Path(__file__).parents[1] / "models" / "version.py"
        print(f"dynamicvit {runpy.run_path(str(file))['__version__']}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}; {advice}" if name else usage(), file=sys.stderr)
        return 2
    return run(name, words)


def run(name: str, words: Sequence[str]) -> int:
    from dynamicvit.errors import exit_status
    from dynamicvit.options import OneLineParser

    OneLineParser.command = f"dynamicvit {name}"
    module = importlib.import_module(COMMANDS[name][0])
    return exit_status(lambda: module.command(words))


if __name__ == "__main__":
    sys.exit(main())
