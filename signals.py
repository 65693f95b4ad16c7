"""Signals: a run that is asked to stop does so at a step that all its processes agree on."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import ClassVar, NoReturn

# Not every system has all of them.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
NOTICE = "SIGUSR1"  # a scheduler's, to a run that is to go on elsewhere: no failure
ONE_SIGNAL_SECONDS = 5  # Ctrl-C comes from the terminal and again from torchrun, which passes it on


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 instead of dying of it. Outside the main thread it notes none."""

    last: ClassVar[str] = ""  # what this process has noted last

    def __init__(self) -> None:
        self.name = ""
        self.noted_at = 0.0
        StopSignal.last = ""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.name:
            self.name, self.noted_at = signal.Signals(number).name, time.monotonic()
            StopSignal.last = self.name
        elif time.monotonic() - self.noted_at > ONE_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # whoever asks twice wants it to end at once

    @property
    def received(self) -> bool:
        return bool(self.name)


class Stopped(Exception):
    """A signal has ended the run, and all that was worth keeping is saved."""


def end_on_interrupt() -> None:
    """For a command's first line: until exit_status has its handlers, Ctrl-C ends it without a traceback.

    Importing torch takes seconds, during which Python would show a traceback from inside torch.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not what nohup or a parent has set
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> bool:
    """Restores Python's own way, KeyboardInterrupt, for a command that has begun and may have to clean up.

    Returns whether it is a command, and not a call from other code, whose handlers stay as they are.
    """
    is_command = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if is_command:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return is_command


def say_and_die() -> NoReturn:
    """For Ctrl-C: one line, then the signal's own end."""
    print("interrupted", file=sys.stderr, flush=True)
    die_of("SIGINT")


def die_of(name: str) -> NoReturn:
    """Ends this process as the signal would have, so that a shell's loop or `&&` stops, too."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # there is none, or nobody reads it
            continue
    number = getattr(signal, name, signal.SIGTERM)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # where the signal is blocked


def die_of_stop_signals() -> None:
    """For a program that has failed, so that its launcher need not wait for it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def ignore_stop_signals(_worker: int | None = None) -> None:
    """For loader processes, which their trainer ends after it has saved, and for a program that is ending anyway."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loader_processes() -> None:
    """At the end of the program, however it ends; they ignore SIGTERM, which is all that torch would send them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()
