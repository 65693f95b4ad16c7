"""Says on stderr how far a long task has come, so that no command is silent for long; tables stay on stdout."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dynamicvit.utils import printable, write_line

EVERY_SECONDS = 5.0

T = TypeVar("T")


def say(message: str) -> None:
    write_line(printable(message))


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a line every few seconds: what, and how many of the total are done."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > EVERY_SECONDS:
            said = time.monotonic()
            say(f"{what}: {done} of {total}")
        yield item
