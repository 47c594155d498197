"""Settings and the values in our own files: what type and range each has, declared beside the field, checked here.

A field says its range in its annotation:

    num_steps: Annotated[int, at_least(1)] = 40

`check_settings` checks a whole config. The command line, `--config` files and the nested settings of a study all go
through it, before a folder is made and before anything heavy is imported. `read_value` reads one value of a JSON or
YAML file as a type, for the files that this project writes itself (`read_fields`: a whole object of them).

Every float must be finite, and every whole number must fit 32 bits, whatever the range says. This module imports
nothing outside the standard library.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from poise.errors import PoiseError

LARGEST = 2**31 - 1
HUGE = 1e6  # weights and coefficients above it only ever give infinities
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not in the range itself. A size is the range of a list's length."""

    low: int | float = -math.inf
    high: int | float = math.inf
    open_low: bool = False
    open_high: bool = False
    of_size: bool = False
    or_zero: bool = False

    def __contains__(self, value: int | float) -> bool:
        if self.or_zero and value == 0:
            return True
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def violated_by(self, value: int | float) -> str:
        """What a value outside must be, in words; of a range up to a very large number only the end it missed."""
        if self.high < HUGE or self.low == -math.inf:
            return str(self)
        return str(Range(high=self.high) if value >= self.high else replace(self, high=math.inf))

    def __str__(self) -> str:
        """In words: `at least 1`, `above 0`, `in [0, 0.5)`, `0, or at least 8`."""
        if self.or_zero:
            return f"0, or {replace(self, or_zero=False)}"
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.low == -math.inf:
            return f"{'below' if self.open_high else 'at most'} {self.high:.10g}"
        ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {ends[0]}{self.low:g}, {self.high:.10g}{ends[1]}"


def at_least(low: int | float, high: int | float = math.inf) -> Range:
    """[low, high]"""
    return Range(low, high)


def above(low: int | float, high: int | float = math.inf) -> Range:
    """(low, high]"""
    return Range(low, high, open_low=True)


def between(low: int | float, high: int | float, *, open_low: bool = False, open_high: bool = False) -> Range:
    """[low, high], or without an end that is open."""
    return Range(low, high, open_low, open_high)


def sized(low: int, high: int | float = math.inf) -> Range:
    """The number of items that a list, or of characters that a text may have."""
    return Range(low, high, of_size=True)


@dataclass(frozen=True)
class Rows:
    """Marks a setting that names a data file, and says what its rows are: a kind of poise.data.examples."""

    kind: Literal["preferences", "prompts", "samples", "questions"]


@dataclass(frozen=True)
class EachOnce:
    """Marks a list in which nothing may stand twice: a model or an arm beside itself says nothing.

    means: of a name the folder that is read, where several names have the same: a run, and the checkpoint in it.
    """

    means: Callable[[str], str] = str


@dataclass(frozen=True)
class ModelPath:
    """Marks a setting that names models: language models, reward models, layers to take, or a stand-in for people."""

    kind: Literal["language model", "policy", "trunk", "reward model", "gold"]


Count = Annotated[int, at_least(1)]
WholeNumber = Annotated[int, at_least(0)]
# Of a sample in tokens. The end of a turn takes up to a handful: shorter samples would all be the same.
Length = Annotated[int, at_least(8)]
LengthOrAll = Annotated[int, replace(at_least(8), or_zero=True)]
Positive = Annotated[float, above(0, HUGE)]
NotNegative = Annotated[float, at_least(0, HUGE)]
Share = Annotated[float, between(0, 1)]
# A larger step than 10 only ever gives infinite weights.
LearningRate = Annotated[float, between(0, 10, open_low=True)]
Bounded = Annotated[float, between(-HUGE, HUGE)]
# What libraries take, with room to count on from it.
Seed = Annotated[int, at_least(0, LARGEST)]
Language = Annotated[str, ModelPath("language model")]
PolicyModel = Annotated[str, ModelPath("policy")]  # a language model, or a policy of ours: adapters, a run
TrunkModel = Annotated[str, ModelPath("trunk")]  # a language model, or a reward model whose layers are taken
Reward = Annotated[str, ModelPath("reward model")]
Gold = Annotated[str, ModelPath("gold")]
Preferences = Annotated[str, Rows("preferences")]
Prompts = Annotated[str, Rows("prompts")]


def bounds(floor: float | None, ceiling: float | None) -> tuple[float, float]:
    """A reward's floor and ceiling, infinite where there is none.

    Raises PoiseError unless the floor is below the ceiling: every reward would be equal.
    """
    low, high = -math.inf if floor is None else floor, math.inf if ceiling is None else ceiling
    if low >= high:
        raise PoiseError(f"--reward-floor must be below --reward-ceiling, got {low:g} and {high:g}")
    return low, high


class Settings:
    """What the settings of every command are: a frozen dataclass whose fields say their ranges.

    RUN_FOLDER: whether `output` is a run folder, which is empty or an earlier one of Poise.
    ADDED: settings that earlier versions did not have, with the value that stands for what a run did without them,
    where that is not the default. A whole config file without one of them gets that value.
    GROWS: settings of which a finished run may take more; it then goes on.
    READ_WITH: settings that are only read with others: whether they are, and what those are in words.
    """

    ADDED: ClassVar[Mapping[str, Any]] = {}
    GROWS: ClassVar[tuple[str, ...]] = ()
    RUN_FOLDER: ClassVar[bool] = False
    READ_WITH: ClassVar[Mapping[str, tuple[Callable[[Any], bool], str]]] = {}

    def check(self) -> None:
        """Raise PoiseError, one line, for a setting of a wrong type or out of range. Commands add what they need."""
        check_settings(self)

    def for_command(self) -> "Settings":
        """The settings as a command runs them: with the default folder, and PoiseError for an input that is missing.

        For settings that Python programs may leave out, since there data and models are given as objects.
        """
        return self


def check_settings(config: Any, inside: str = "", default: Any = None) -> None:
    """Raise PoiseError, naming option, range and value, for the first setting that its annotation does not allow.

    inside: what stands before the names of the options, such as `reward.` in a study. default: of a config within
    another the one that it is by default. A text may be empty only where it is so by default.
    """
    default = type(config) if default is None else default
    for name, (kind, value) in typed_fields(config).items():
        if is_dataclass(value):
            check_settings(value, f"{inside}{name}.", getattr(default, name, None))
            continue
        option = f"--{inside}{name}".replace("_", "-")
        if wrong := problem(value, kind):
            raise PoiseError(f"{option} must be {wrong}, got {shown(value)}")
        texts = value if isinstance(value, (tuple, list)) else [value] if getattr(default, name, None) != value else []
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise PoiseError(f"{option} is empty; name something, or leave it out")
        for mark in marks(kind):
            if isinstance(mark, EachOnce) and (again := _first_again(value, mark.means)):
                raise PoiseError(f"{option} names {again} twice")


def unread(config: Settings, inside: str = "", default: Any = None) -> Iterator[str]:
    """A line for every setting that was given and that nothing reads, since another one is not as it needs it.

    No error: who turns something off for once leaves the rest of a config file as it is. inside, default: as
    `check_settings` takes them.
    """
    default = type(config) if default is None else default
    for name, (_, value) in typed_fields(config).items():
        if isinstance(value, Settings):
            yield from unread(value, f"{inside}{name}.", getattr(default, name, None))
        elif name in config.READ_WITH and value != getattr(default, name):
            is_read, words = config.READ_WITH[name]
            if not is_read(config):
                option = f"--{inside}{name}".replace("_", "-")
                yield f"{option} is not read: it needs {words}"


def _first_again(items: Any, means: Callable[[str], str]) -> str:
    """The first item of a list that has stood before, also by another name, which is said then; "" if none has."""
    found: dict[Any, Any] = {}
    for one in items:
        plain = isinstance(one, str) and "\0" not in one
        same = os.path.realpath(means(one.strip())) if plain else one
        if same in found:
            other = plain and os.path.realpath(one.strip()) != os.path.realpath(found[same].strip())
            return f"{one}, which is {found[same]}," if other else str(one)
        found[same] = one
    return ""


def same_value(one: Any, other: Any) -> bool:
    """Are two plain values of a setting the same, or names of one file or folder in two spellings?"""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    try:
        return one == other or (isinstance(one, str) and isinstance(other, str) and os.path.samefile(one, other))
    except (OSError, ValueError):
        return False  # there is no such file


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raise PoiseError, naming range and value, for an argument of a Python program that `kind` does not allow."""
    if wrong := problem(value, kind):
        raise PoiseError(f"{name} must be {wrong}, got {shown(value)}")


def typed_fields(config: Any) -> dict[str, tuple[Any, Any]]:
    """Of a dataclass object: by name, each field's annotation, with its ranges and marks, and its value."""
    kinds = hints(type(config))
    return {field.name: (kinds[field.name], getattr(config, field.name)) for field in fields(config)}


def marks(kind: Any) -> Iterator[Any]:
    """What stands beside the type in an annotation, also within tuples and unions."""
    for part in get_args(kind):
        if get_origin(kind) is Annotated and part is not get_args(kind)[0]:
            yield part
        else:
            yield from marks(part)


def hints(kind: type) -> dict[str, Any]:
    """The annotations of a class, with their ranges."""
    return get_type_hints(kind, include_extras=True)


def problem(value: Any, kind: Any) -> str:
    """What `value` must be instead, in words, where `kind` does not allow it; otherwise an empty text.

    >>> problem(0, Annotated[int, at_least(1)]), problem(math.nan, float), problem(None, float | None)
    ('at least 1', 'a finite number', '')
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return problem(value, parts[0]) or _out_of_range(value, parts[1:])
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return ""
        each = [problem(value, one) for one in parts if one is not NoneType]
        return "" if "" in each else " or ".join(each)
    if origin is Literal:
        return "" if value in parts and type(value) in map(type, parts) else f"one of {', '.join(map(str, parts))}"
    if origin in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return "a list"
        return next((f"a list whose items are {wrong}" for one in value if (wrong := problem(one, parts[0]))), "")
    if origin is dict:
        if not isinstance(value, dict):
            return "an object"
        return next((f"an object of values {wrong}" for one in value.values() if (wrong := problem(one, parts[1]))), "")
    return _of_plain_type(value, kind)


def _of_plain_type(value: Any, kind: Any) -> str:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and abs(value) <= 1e300 else "a finite number"
    if kind is int:
        if type(value) is not int:
            return "a whole number"
        return "" if abs(value) <= LARGEST else f"at most {LARGEST}"
    words = {str: "text", bool: "true or false", dict: "an object", list: "a list"}
    return "" if kind is Any or isinstance(value, kind) else words.get(kind, getattr(kind, "__name__", str(kind)))


def _out_of_range(value: Any, ranges: tuple[Any, ...]) -> str:
    for allowed in ranges:
        if isinstance(allowed, Range) and allowed.of_size and len(value) not in allowed:
            return f"{'text' if isinstance(value, str) else 'a list'} of length {allowed}"
        if isinstance(allowed, Range) and not allowed.of_size and value not in allowed:
            return allowed.violated_by(value)
    return ""


def shown(value: Any) -> str:
    """A wrong value for a message: short, and on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join((repr(value) if isinstance(value, (str, list, tuple, dict)) else str(value)).split())
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_address(option: str, text: str) -> None:
    """Raise PoiseError for what is no plain address of a server; one with a name and a password is not repeated."""
    try:
        parts = urlsplit(text)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        plain = plain and bool((parts.hostname or "").encode("idna")) and parts.path.isascii()
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        plain = secret = False
    if secret:
        raise PoiseError(f"{option}: the address holds a user's name or password; give the key by its variable instead")
    if not plain or not text.isprintable() or " " in text or "?" in text or "#" in text:
        raise PoiseError(f"{option} {shown(text)}: an address was expected, e.g. http://127.0.0.1:8000")


# ---- values of our own files ----


class NumberAsWritten(float):
    """A number of a YAML file, which may stand where text is expected: as a folder's name `1.50` is not `1.5`."""

    text: str


def read_value(value: Any, kind: Any, what: str) -> Any:
    """A value of a JSON file as `kind`: lists become tuples, whole numbers floats, where `kind` asks for them.

    what: where the value stands, for the message. Raises PoiseError for a value that `kind` does not allow.
    """
    if wrong := problem(value, kind):
        raise PoiseError(f"{what} must be {wrong}, got {shown(value)}")
    return _as(value, kind)


def read_fields(saved: Any, kind: type[T], what: str) -> T:
    """An object of a JSON file as the dataclass `kind`: every field there, of its type and in its range.

    what: the object, for messages. Raises PoiseError for a field that is missing, unknown or wrong. A field with a
    default may be missing.
    """
    if not isinstance(saved, Mapping):
        raise PoiseError(f"{what} must be an object, got {shown(saved)}")
    known = {field.name: field for field in fields(cast(Any, kind))}
    if unknown := sorted(str(name) for name in saved if name not in known):
        raise PoiseError(f"{what} has the field {shown(unknown[0])}, which this version does not read")
    needed = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in needed if name not in saved]:
        raise PoiseError(f"{what} lacks {missing[0]!r}")
    return kind(**{name: read_value(value, hints(kind)[name], f"{what}: {name}") for name, value in saved.items()})


def _as(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _as(value, parts[0])
    if origin is tuple:
        return tuple(_as(item, parts[0]) for item in value)
    return float(value) if kind is float else value


def finite_or_raise(value: T, what: str) -> T:
    """`value` as it is, JSON or rows of it. Raises PoiseError, naming the field, for a number in it that is not finite.

    Every JSON file that this project writes goes through it.

    >>> finite_or_raise({"mean": [1.0, 2.0]}, "row 1")
    {'mean': [1.0, 2.0]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise PoiseError(f"{what} is {value}, not a number; nothing is written")
    if isinstance(value, dict):
        for name, one in value.items():
            finite_or_raise(one, f"{what}: {name}")
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value, 1):
            if isinstance(one, (float, dict, list, tuple)):
                finite_or_raise(one, f"{what}, number {number}")
    return value
