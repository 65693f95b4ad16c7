"""A run's checkpoints: which one to resume, what is in it, and writing it so that nothing is lost."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from dynamicvit.errors import UserError
from dynamicvit.models import CheckpointError, ModelError, ModelSpec, read_checkpoint
from dynamicvit.models.pretrained import BEST, LAST, checkpoint_in, spec_of
from dynamicvit.runs.whole import temporary_path, try_to_write, whole_file
from dynamicvit.utils import gather, get_rank, is_main_process, printable, warn
from torch import Tensor


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0
    images: int = 0  # of this epoch, by all processes together
    history: list[dict[str, int | float]] = field(default_factory=list)  # what log.txt says, an entry an epoch
    dense: dict[str, float] | None = None  # the teacher's own validation
    bad_images: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)  # fingerprints, by data set


@dataclass
class RunState:
    """What a run saves, from which it goes on exactly where it stood.

    Random states are not in it: all draws follow from the seed and the position in the run.
    In the file the fields are the keys, with progress's fields beside them.
    """

    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    sums: list[dict[str, Tensor]]  # every process's running means of the epoch
    amp: str
    args: dict[str, Any]  # the command's flags
    spec: ModelSpec | None
    progress: Progress

    def to_content(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self)} | vars(self.progress)
        del content["progress"]
        return content | {"spec": self.spec and self.spec.to_dict()}

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "RunState":
        """Raises UserError for a file that does not hold a complete run of this program."""
        known = {f.name for f in fields(Progress)}
        needed = {f.name for f in fields(cls)} - {"progress", "spec"} | {"epoch", "images", "history"}
        missing = sorted(needed - set(content))
        if "optimizer" in missing:
            raise UserError("the file to resume is not a run of this program; start from its weights with --pretrained")
        if missing or (content["epoch"] and not content["history"]) or not content["sums"]:
            lack = ", ".join(missing) or ("history" if content["sums"] else "sums")
            raise UserError(f"the file to resume lacks a part ({lack}); start from its weights with --pretrained")
        hints = get_type_hints(cls) | get_type_hints(Progress)
        wrong = [name for name in sorted((needed | known) & set(content)) if not fits(content[name], hints[name])]
        if wrong:
            raise UserError(
                f"the file to resume is damaged (its {wrong[0]} is not a run's); start from its weights with "
                "--pretrained"
            )
        progress = Progress(**{name: content[name] for name in known if name in content})
        own = {f.name: content[f.name] for f in fields(cls) if f.name not in ("progress", "spec")}
        return cls(**own, spec=spec_of(content), progress=progress)


def fits(value: object, hint: Any) -> bool:
    """Whether a value from a file is of a field's type; whole numbers must not be negative."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(fits(value, other) for other in inner)
    if kind is dict:
        return isinstance(value, dict) and all(fits(n, inner[0]) and fits(v, inner[1]) for n, v in value.items())
    if kind is list:
        return isinstance(value, list) and all(fits(entry, inner[0]) for entry in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and (hint is float or value >= 0)
    return hint is Any or isinstance(value, hint)


@dataclass(frozen=True)
class Place:
    """Where a command's run is, and what it may resume."""

    output_dir: str
    resume: str  # a file, a run's folder, "auto" or "none"
    evaluating: bool


Changes = Callable[[dict[str, Any]], list[str]]  # a checkpoint's content -> where this command differs from it


def find_checkpoint(place: Place, changes: Changes) -> Path | None:
    """The file to resume, as far as this machine's file system shows it.

    An earlier run in --output-dir is resumed or left alone, never overwritten: UserError.
    """
    last = Path(place.output_dir) / LAST if place.output_dir else None
    held = last is not None and last.is_file()
    names = (BEST, LAST) if place.evaluating else (LAST,)
    if place.resume == "auto":
        path = place.output_dir and checkpoint_in(place.output_dir, names)
        return path if path and path.is_file() else None
    if place.resume == "none":
        if held and not place.evaluating:
            raise UserError(f"{place.output_dir} holds an earlier run; choose another --output-dir, or --resume auto")
        return None
    path = checkpoint_in(place.resume, names)
    if place.evaluating or not held:
        return path
    if not changes(read_checkpoint(last)):
        return last  # this very command was begun before
    if path.resolve().parent != last.resolve().parent:
        raise UserError(f"{place.output_dir} holds another run; choose another --output-dir for this one")
    return path


def read_run(place: Place, changes: Changes) -> dict[str, Any] | None:
    """The content of the checkpoint to resume, in every process.

    Machines need not share a file system, and after a restart rank 0 may be on another one than
    before: the newest file that any of them holds counts. A process that sees it reads it itself;
    the others receive it.
    """
    _, unwritable = attempt(make_writable, place)
    path, error = attempt(find_checkpoint, place, changes)
    ages, errors = zip(*gather((modification(path), unwritable or error)), strict=True)
    raise_first(errors)  # all processes, so that none waits for a lost peer
    if max(ages) == NOT_WANTED:
        return None
    reader = ages.index(max(ages))
    content, error = attempt(read_and_check, place, path, changes) if ages[get_rank()] == max(ages) else (None, None)
    raise_first(gather(error))
    if get_rank() == reader:
        print(f"checkpoint: {printable(path)}", flush=True)
    lacking = [rank for rank, age in enumerate(ages) if age != max(ages)]
    return send(content, reader, lacking) if lacking else content


def send(content: dict[str, Any] | None, source: int, ranks: list[int]) -> dict[str, Any]:
    """Gives the source's content to these ranks. Collective: call it in all processes."""
    group = dist.new_group([source, *ranks])
    if get_rank() in (source, *ranks):
        shared = [content]
        dist.broadcast_object_list(shared, src=source, group=group)
        return shared[0]
    return content


def attempt(action: Callable, *arguments: object) -> tuple[Any, Exception | None]:
    """The action's result, or the error that it ended in."""
    try:
        return action(*arguments), None
    except (UserError, ModelError, OSError) as error:
        return None, error


def raise_first(errors: Iterable[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


NOT_WANTED, NOT_THERE = (-1, 0), (0, 0)


def modification(path: Path | None) -> tuple[int, int]:
    """(time in ns, bytes), which tell one file from another."""
    if path is None:
        return NOT_WANTED
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else NOT_THERE


def read_and_check(place: Place, path: Path, changes: Changes) -> dict[str, Any]:
    best = path.with_name(BEST)
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        if path.name == LAST and best.is_file():
            raise CheckpointError(f"{error}; to go on from the best epoch: cp {best} {path}") from error
        raise
    if place.resume == "auto" and not place.evaluating:
        changed = changes(content)
        if changed:
            raise UserError(
                f"{place.output_dir} holds a run with different arguments ({', '.join(changed)}); "
                f"choose another --output-dir, or go on from it with --resume {path}"
            )
    return content


def make_writable(place: Place) -> None:
    """Makes the --output-dir of a training run. UserError if nothing can be written there."""
    if not place.output_dir or place.evaluating or not is_main_process():
        return
    folder = Path(place.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder / "probe")
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {folder} ({error.strerror})") from error


class CheckpointWriter:
    """Writes checkpoints in the background; training waits for the copy and the write before it. Used by rank 0.

    One that cannot be written leaves the file before it as it is, and is tried again with the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None
        self.unwritten: dict[str, dict] = {}  # by file name: the content that has to be written yet
        for name in (LAST, BEST):  # of a run that was killed
            temporary_path(folder / name).unlink(missing_ok=True)

    def save(self, state: RunState, names: tuple[str, ...]) -> None:
        if self.pending is not None:
            self.pending.result()
        self.unwritten |= dict.fromkeys(names, copy_to_cpu(state.to_content()))
        self.pending = self.thread.submit(self._write)

    def _write(self) -> None:
        for name, content in list(self.unwritten.items()):
            try:
                write_checkpoint(content, self.folder / name)
                del self.unwritten[name]
            except UserError as error:
                warn(f"{error}; training goes on")

    def wait(self) -> None:
        """Waits until all is on disk; raises UserError if that is impossible."""
        if self.pending is not None:
            self.pending.result()
        for name, content in self.unwritten.items():
            write_checkpoint(content, self.folder / name)


def copy_to_cpu(value: object) -> object:
    """A copy that later training steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(entry) for entry in value]
    return value


def write_checkpoint(content: dict, path: Path) -> None:
    """Writes aside, flushes and renames: path is whole at any moment, even if the disk is full."""
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path} ({reason}); the checkpoint before it is untouched") from error
