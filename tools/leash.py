"""Runs a script, and stops it when standard input ends: closed by whoever started it, who may also have been killed.

    python tools/leash.py SCRIPT [ARGUMENT ...]

The script then gets SIGTERM, and saves what it would save at any other one. This is the only way that works
everywhere, as a killed parent cannot pass on its SIGKILL.
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

STDIN = 0


def main() -> None:
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if Python had been given the script itself
    threading.Thread(target=stop_when_let_go, daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")


def stop_when_let_go() -> None:
    while os.read(STDIN, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
