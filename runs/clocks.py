"""When a checkpoint is due, and how long a run will still take."""

import math
import time
from datetime import timedelta

from dynamicvit.errors import UserError


class SaveClock:
    """Tells when a checkpoint is due: every 500 steps ("500") or 15 minutes ("15m"), for instance; "0": never."""

    def __init__(self, frequency: str) -> None:
        """Raises UserError for anything else."""
        self.in_minutes = frequency.endswith("m")
        try:
            self.interval = float(frequency[:-1]) if self.in_minutes else int(frequency)
        except ValueError:
            self.interval = -1
        if not 0 <= self.interval < math.inf:
            raise UserError(f"--save-freq must be a number of steps (500) or of minutes (15m), got {frequency}")
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()

    def is_due(self, step: int) -> bool:
        if self.in_minutes and self.interval > 0:
            return time.monotonic() - self.started >= 60 * self.interval
        return self.interval > 0 and step % self.interval == 0


class Eta:
    """Time left, from the mean pace so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.started = time.monotonic()

    def advance(self) -> None:
        self.done += 1

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.started
        return str(timedelta(seconds=round(elapsed / max(self.done, 1) * (self.total - self.done))))
