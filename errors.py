"""Errors that users can fix: one line, what is wrong and what to do, and exit status 2."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from dynamicvit.models import CheckpointError, ModelError
from dynamicvit.signals import (
    NOTICE,
    Stopped,
    StopSignal,
    die_of,
    die_of_stop_signals,
    end_loader_processes,
    ignore_stop_signals,
    raise_on_interrupt,
    say_and_die,
)
from dynamicvit.utils import LaunchError, log, printable, say_once, write_line


class UserError(Exception):
    """Something that the user can fix; shown as one line, without a traceback."""


class LocalError(UserError):
    """An error that only one process knows of."""


class ImageError(LocalError):
    """An image that cannot be read."""


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Adds a command's own advice to the library's errors about weights, as the library knows no flags."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {text}") from error


def exit_status(command: Callable[[], None]) -> int:
    """Runs a command, showing errors that users can fix as one line. Returns the program's exit status.

    0: done, or stopped by a scheduler's notice with all saved. 2: the user's error. A command stopped by another
    signal prints its line and then dies of that signal, so that a shell's loop or `&&` stops, too.
    """
    print_anywhere()
    is_command, at_the_end = raise_on_interrupt(), die_of_stop_signals
    if is_command:
        sys.unraisablehook = without_noise
    try:
        try:
            command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, so that a pipe that nobody reads gives no traceback
        return 0
    except Stopped as stopped:
        at_the_end = ignore_stop_signals  # a second notice must not make a failure of what is saved
        at_the_end()
        log(str(stopped))
        end_loader_processes()
        if StopSignal.last not in ("", NOTICE):
            die_of(StopSignal.last)
        return 0
    except BrokenPipeError:
        end_loader_processes()
        die_of("SIGPIPE")
    except (Exception, KeyboardInterrupt) as error:
        die_of_stop_signals()
        end_loader_processes()  # before their loaders are destroyed, which would complain
        if isinstance(error, KeyboardInterrupt):
            say_and_die()
        known = for_the_user(error)
        if known is None:
            raise
        print_error(known)
        return 2
    finally:
        end_loader_processes()
        if is_command:
            at_the_end()  # only Python's own shutdown is left, where Ctrl-C would show a traceback


def print_anywhere() -> None:
    """Lets every name be printed on every terminal: characters that it lacks become escapes."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")


def without_noise(raised: "sys.UnraisableHookArgs") -> None:
    """Handles what is raised where nothing can catch it: Ctrl-C ends the program there, too, and complaints of a
    loader that is destroyed after its processes are ignored."""
    if isinstance(raised.exc_value, KeyboardInterrupt):
        say_and_die()
    if "DataLoader" not in getattr(raised.object, "__qualname__", ""):
        sys.__unraisablehook__(raised)


def for_the_user(error: Exception) -> Exception | None:
    """The error to show, whose message says what to do; None for a bug in the program."""
    worker_died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if worker_died or isinstance(error, ConnectionResetError):  # while an image was fetched from it
        return LocalError(f"a loader process died, most likely because memory ran out ({error}); lower --num-workers")
    if isinstance(error, (UserError, ModelError, LaunchError, OSError)):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return LocalError("out of GPU memory; lower --batch-size (in training, raise --update-freq to match)")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return LocalError("out of memory; lower --batch-size or --num-workers, or end other programs")
    if isinstance(error, RuntimeError) and "Too many open files" in str(error):
        return LocalError("too many open files; raise the limit (ulimit -n 4096), or lower --num-workers")
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return LocalError("another process is gone; its own message says why")
    return None


def print_error(error: Exception) -> None:
    """Prints one line on stderr; if several processes meet the same error, only one of them prints it."""
    message = str(error) or type(error).__name__
    if "Original Traceback" in message:  # of a loader process, whose own error comes after it
        message = message.splitlines()[-1].removeprefix("dynamicvit.errors.ImageError: ")
    message = printable(message)
    with say_once(message) as chosen:
        if chosen or isinstance(error, LocalError):
            write_line(f"error: {message}")
