"""Errors that users can fix: one line, what is wrong and what to do, and exit status 2."""

import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from dynamicvit.models import ModelError
from dynamicvit.signals import Stopped, die_of_stop_signals, end_loader_processes, ignore_stop_signals
from dynamicvit.utils import LaunchError, is_main_process, log


class UserError(Exception):
    """Something that the user can fix; shown as one line, without a traceback."""


class LocalError(UserError):
    """One that only the process that met it knows of."""


class ImageError(LocalError):
    """An image that cannot be read."""


def exit_status(command: Callable[[], None]) -> int:
    """Runs it, with what users can fix said in one line. Returns the program's exit status."""
    try:
        command()
        return 0
    except Stopped as stopped:
        ignore_stop_signals()
        log(str(stopped))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        die_of_stop_signals()
        end_loader_processes()  # before their loaders are taken apart, of which they would complain
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            return 2
        known = for_the_user(error)
        if known is None:
            raise
        print_error(known)
        return 2
    finally:
        end_loader_processes()


def for_the_user(error: Exception) -> Exception | None:
    """The error whose message tells what to do; None for one that is a fault of the program."""
    if isinstance(error, (UserError, ModelError, LaunchError, OSError)):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return LocalError("out of GPU memory; lower --batch-size (in training, raise --update-freq to match)")
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return LocalError(f"a loader process died, most likely because memory ran out ({error}); lower --num-workers")
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return LocalError("another process is gone; its own message says why")
    return None


def print_error(error: Exception) -> None:
    """One line on stderr; from one process only, where all of them met the same error."""
    if not is_main_process() and not isinstance(error, LocalError):
        time.sleep(5)  # if rank 0 met the same, the launcher now ends this process
    # a loader process's error comes with its traceback before it
    message = (str(error).splitlines() or [type(error).__name__])[-1].removeprefix("errors.ImageError: ")
    print(f"error: {message}", file=sys.stderr, flush=True)
