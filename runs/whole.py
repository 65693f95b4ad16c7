"""Files that are whole at any moment, however a run or a command ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynamicvit.errors import UserError


def temporary_path(path: Path) -> Path:
    """Where a file is written before it gets its name. The ending stays, as some writers choose the format by it."""
    return path.with_name(f"{path.stem}.tmp{path.suffix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write; what is there at the end is flushed and gets its name. After an error the earlier file stays."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """For a check before any work: UserError if the file could not be written at the end."""
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: no such folder: {path.parent}")
    try:
        try_to_write(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error


def try_to_write(path: Path) -> None:
    """Raises OSError if no such file could be written: permission bits alone do not tell, in /sys or for root."""
    probe = temporary_path(path)
    probe.touch()
    probe.unlink()
