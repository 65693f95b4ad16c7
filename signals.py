"""Signals: a run that is asked to stop does so at a step that all its processes agree on."""

import multiprocessing
import signal
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_SIGNAL_SECONDS = 5  # Ctrl-C comes from the terminal and again from torchrun, which passes it on


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 instead of dying of it."""

    def __init__(self) -> None:
        self.name = ""
        self.noted_at = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.name:
            self.name, self.noted_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.noted_at > ONE_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # whoever asks twice wants it to end at once

    @property
    def received(self) -> bool:
        return bool(self.name)


class Stopped(Exception):
    """A signal has ended the run, and all that was worth keeping is saved."""


def die_of_stop_signals() -> None:
    """For a program that has failed: its launcher need not wait for it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def ignore_stop_signals(_worker: int | None = None) -> None:
    """For loader processes, which their trainer ends after it has saved, and for a program that is ending anyway."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loader_processes() -> None:
    """At the end of the program, however it ends; they ignore SIGTERM, which is all that torch would send them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()
