"""Settings that are written once: a dataclass's field states the default, range and help, and the flag is made from
that. Also the flags that describe the model, which the tools share."""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from dynamicvit.errors import UserError
from dynamicvit.models import ARCHS, REDUCERS, SCORERS
from dynamicvit.models.pruning import PLACES
from dynamicvit.models.spec import LARGEST

Number = int | float
Range = tuple[str, Callable[[Number], bool]]
T = TypeVar("T")


def up_to(most: Number, least: Number = 1) -> Range:
    return f"from {least:,} to {most:,}", lambda x: least <= x <= most


# Ranges of numbers: the words for a message, and the test. Neither infinity nor not-a-number is in any. Numbers that
# cost memory or time are limited well beyond what can be of use, so that a typing error does not use up either.
POSITIVE: Range = ("positive", lambda x: x > 0)
NOT_NEGATIVE: Range = ("0 or more", lambda x: x >= 0)
SHARE: Range = ("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_ONE: Range = ("from 0 to below 1", lambda x: 0 <= x < 1)
KEEP_RATE: Range = ("above 0 and at most 1", lambda x: 0 < x <= 1)
SEED: Range = ("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
SIDE = up_to(LARGEST["img_size"])  # pixels
BATCH = up_to(65_536)  # images
WORKERS = up_to(4096, least=0)  # processes
EPOCHS, STEPS = up_to(100_000), up_to(10**9)


# --- A setting, and its flag


def setting(
    default: Any,
    help: str,
    allowed: Range | None = None,
    *,
    group: str,
    choices: Collection[str] | Callable[[], Collection[str]] | None = None,
    read: Callable[[str], Any] | None = None,
    excludes: Mapping[str, str] | None = None,
    needs: str | None = None,
    unset: str = "none",
) -> Any:
    """A dataclass field that has a flag; the field's annotation gives its type (tuple: several values).

    allowed: the range of its numbers. choices: words, or a function that returns them when they are needed. read:
    instead of these, a function that turns a word into the value. group: the heading in --help. excludes: by name,
    settings that cannot be given together with this one, and why not. needs: the setting without which this one does
    nothing. unset: what None means, where another value is a recipe's default.
    """
    metadata = {"help": help, "allowed": allowed, "group": group, "choices": choices, "read": read, "unset": unset}
    return field(default=default, metadata=metadata | {"excludes": excludes or {}, "needs": needs})


def settings_in(kind: type) -> list[Field]:
    """A dataclass's fields that have a flag."""
    return [f for f in fields(kind) if "help" in f.metadata]


def add_flags(parser: "OneLineParser", kind: type, defaults: Mapping[str, Any] | None = None) -> None:
    """Makes a flag from each of a dataclass's settings. One that is not given is None.

    defaults: instances by name, where several compete for the default (recipes).
    """
    for f in settings_in(kind):
        values = {name: getattr(instance, f.name) for name, instance in (defaults or {"": kind}).items()}
        arguments = {"dest": f.name, "default": None, "help": f.metadata["help"] + default_text(f, values)}
        parser.group(f.metadata["group"]).add_argument(flag_of(f.name), **arguments, **word_reader(f))
        for other, reason in f.metadata["excludes"].items():
            parser.exclude(flag_of(f.name), flag_of(other), reason=reason)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def word_reader(f: Field) -> dict[str, Any]:
    """What argparse needs to read a setting's words."""
    kind = f.type
    if isinstance(kind, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    several = {}
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        several = {"nargs": "+" if parts[-1] is Ellipsis else len(parts)}
        kind = parts[0]
    choices = f.metadata["choices"]
    if choices is not None:
        return several | {"choices": list(choices() if callable(choices) else choices)}
    reader = f.metadata["read"] or (text if kind is str else number(kind, f.metadata["allowed"]))
    return several | {"type": reader}


def default_text(f: Field, values: Mapping[str, Any]) -> str:
    """For help: the default, and those of others where they differ from the first."""
    (_, first), *rest = values.items()
    others = [f"{name} {readable(value, f)}" for name, value in rest if value != first]
    if "(default" in f.metadata["help"] or (not others and (first in (None, "") or first is False)):
        return ""
    return f" (default: {', '.join([readable(first, f), *others])})"


def readable(value: Any, f: Field) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f.metadata["unset"] if value is None else str(value)


def text(word: str) -> str:
    """For argparse's type=: a path or a name. An empty one comes from an unset shell variable, and would mean the
    current folder, or nothing."""
    if not word.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return word


def path(word: str) -> Path:
    """As text."""
    return Path(text(word))


def number(kind: type[Number], allowed: Range) -> Callable[[str], Number]:
    """For argparse's type=: a finite number of the kind that is allowed."""
    what, test = allowed

    def read(word: str) -> Number:
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not {'a whole' if kind is int else 'a'} number: {word}") from None
        if not math.isfinite(value) or not test(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {word}")
        return value

    return read


def take(kind: type[T], args: argparse.Namespace) -> T:
    """A dataclass from the flags named after its settings; its own defaults for those that were not given."""
    return kind(**given(kind, args))


def given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """A dataclass's settings that the command line gives a value."""
    values = {f.name: getattr(args, f.name) for f in settings_in(kind) if getattr(args, f.name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_settings(instance: Any) -> None:
    """For values that did not come from a command line: UserError for one that its flag would refuse."""
    for f in settings_in(type(instance)):
        value, allowed, choices = getattr(instance, f.name), f.metadata["allowed"], f.metadata["choices"]
        for entry in value if isinstance(value, tuple) else (value,):
            if allowed and entry is not None and not (math.isfinite(entry) and allowed[1](entry)):
                raise UserError(f"{flag_of(f.name)} must be {allowed[0]}, got {entry}")
            if choices and not callable(choices) and entry not in choices:
                raise UserError(f"{flag_of(f.name)} must be one of {', '.join(choices)}, got {entry}")


def check_needs(instance: Any, given: Collection[str]) -> None:
    """Raises UserError for a given setting, by name, that does nothing because another one is off."""
    for f in settings_in(type(instance)):
        needed = f.metadata["needs"]
        if f.name in given and needed and not getattr(instance, needed):
            raise UserError(
                f"{flag_of(f.name)} does nothing without {flag_of(needed)}; "
                f"add {flag_of(needed)}, or leave {flag_of(f.name)} out"
            )


# --- The parser


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no abbreviations, which a new flag could make ambiguous."""

    command: ClassVar[str] = ""  # in place of every prog, where commands go by another name (dynamicvit train)

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        super().__init__(prog=self.command or prog, formatter_class=DefaultsHelp, allow_abbrev=False, **kwargs)
        self.register("type", Path, path)
        self.groups: dict[str, Any] = {}
        self.exclusions: list[tuple[Sequence[str], str]] = []

    def error(self, message: str) -> None:
        raise UserError(message)

    def group(self, title: str, description: str | None = None) -> Any:
        """A heading in --help, to add flags to; made when it is first asked for."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title, description)
        return self.groups[title]

    def exclude(self, *flags: str, reason: str = "give one of them") -> None:
        """No two of these flags can be given together, whatever their defaults."""
        self.exclusions.append((flags, reason))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        parsed = super().parse_known_args(words, namespace)
        names = {word.partition("=")[0] for word in words}
        for flags, reason in self.exclusions:
            found = [flag for flag in flags if flag in names]
            if len(found) > 1:
                self.error(f"{' and '.join(found)} exclude each other: {reason}")
        return parsed


class DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none or the help says it in words; keeps a description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # so that flags stay whole

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent) for line in lines)


def dashed(argv: Sequence[str]) -> list[str]:
    """Lets every flag be written with _ as well as with -."""
    dashed_argv = []
    for word in argv:
        name, equals, value = word.partition("=")
        dashed_argv.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return dashed_argv


# --- What the model is

MODEL = "model"


@dataclass(frozen=True)
class ModelFlags:
    """What the model is, and which weights it starts from; None leaves it to a checkpoint or the architecture."""

    arch: str | None = setting(
        None, f"{', '.join(ARCHS)}, or a timm name (default: the checkpoint's, else deit_small)", group=MODEL
    )
    dense: bool = setting(False, "the plain backbone, without pruning: a teacher for your own data", group=MODEL)
    base_rate: float | None = setting(
        None,
        "stage s keeps base_rate^s of the original tokens (default: the checkpoint's, else 0.7)",
        KEEP_RATE,
        group=MODEL,
    )
    keep_rates: tuple[float, ...] | None = setting(
        None,
        "instead of --base-rate: the share of the original tokens kept after each stage",
        KEEP_RATE,
        group=MODEL,
        excludes={"base_rate": "both say how many tokens each stage keeps"},
    )
    pruning_loc: tuple[int, ...] | None = setting(
        None,
        "blocks before which tokens are reduced (default: the arch's)",
        up_to(LARGEST["depth"], least=0),
        group=MODEL,
    )
    scorer: str | None = setting(
        None, "what ranks tokens (default: the checkpoint's, else predictor)", group=MODEL, choices=SCORERS
    )
    reducer: str | None = setting(
        None, "what happens to the other tokens (default: the checkpoint's, else drop)", group=MODEL, choices=REDUCERS
    )
    place: str | None = setting(
        None,
        "where stages are: before their blocks, or inside, between attention and MLP (default: the checkpoint's, else "
        "before)",
        group=MODEL,
        choices=PLACES,
    )
    merge_streams: bool = setting(
        False,
        "Swin, ConvNeXt: in training, as in evaluation, a location that is kept again continues from its true value",
        group=MODEL,
    )
    input_size: int | None = setting(
        None, "pixels (default: the arch's; 224 for the papers' models)", SIDE, group=MODEL
    )
    patch_size: int | None = setting(
        None, "side of a patch in pixels (default: the arch's)", up_to(LARGEST["patch_size"]), group=MODEL
    )
    embed_dim: int | None = setting(
        None, "channels of a token (default: the arch's)", up_to(LARGEST["embed_dim"]), group=MODEL
    )
    depth: int | None = setting(None, "blocks (default: the arch's)", up_to(LARGEST["depth"]), group=MODEL)
    mlp_ratio: float | None = setting(
        None,
        "an MLP's hidden channels for each channel of a token (default: the arch's)",
        ("above 0 and at most 64", lambda x: 0 < x <= LARGEST["mlp_ratio"]),
        group=MODEL,
    )
    num_heads: tuple[int, ...] | None = setting(
        None,
        "attention heads; Swin: for each stage (default: the arch's)",
        up_to(LARGEST["num_heads"]),
        group=MODEL,
    )
    depths: tuple[int, ...] | None = setting(
        None, "Swin, ConvNeXt: blocks of each stage (default: the arch's)", up_to(LARGEST["depths"]), group=MODEL
    )
    window_size: int | None = setting(
        None, "Swin: side of a window in tokens (default: the arch's)", up_to(LARGEST["window_size"]), group=MODEL
    )
    pretrained: str | None = setting(
        None,
        "dense weights to start from, a file or folder (default: the arch's in pretrained/, or timm's)",
        group=MODEL,
    )


def add_model_flags(parser: OneLineParser) -> None:
    """For tools, which read them with take(ModelFlags, args)."""
    add_flags(parser, ModelFlags)
