"""Config files: YAML as people mean it, of bounded size, with every trouble one line that says where and what to do.

What YAML 1.1 makes of plain words surprises: `010` is eight, `1:30` is ninety, `12:30:00` is 45000, and a date is no
text. Here a whole number is one only as people write them, other such words stay text, and a number that a setting
takes as text (the name of a folder) stays as it was written. An alias (`*name`) stands for a single value.
"""

import os
import re
from pathlib import Path
from typing import Any, cast

import yaml

from poise.errors import PoiseError, first_line
from poise.runtime.records import Json, checked
from poise.runtime.settings import NumberAsWritten

_LARGEST = 2**20  # bytes; that of a study has twenty thousand
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_RESOLVED = ("int", "float", "timestamp")


class _Loader(yaml.SafeLoader):
    """Refuses a name given twice, since YAML's readers differ in which they take, and aliases of more than a value."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if isinstance(alias, yaml.AliasEvent) and isinstance(node, yaml.CollectionNode):
            raise yaml.composer.ComposerError(
                problem=f"*{alias.anchor} stands for a list or for settings; write them out",
                problem_mark=cast(Any, alias.start_mark),
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is there twice", problem_mark=key.start_mark
                )
            names |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)

    def _number(self, node: yaml.ScalarNode) -> NumberAsWritten:
        number = NumberAsWritten(self.construct_yaml_float(node))
        number.text = node.value
        return number


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, words) for tag, words in resolvers if tag.removeprefix(_TAG) not in _RESOLVED]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(rf"(?:{_WHOLE.pattern})\Z"), list("-0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(rf"(?:{_NUMBER.pattern})\Z"), list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}float", _Loader._number)


def load_config_file(path: str | Path, kind: type | None = None) -> Json:
    """The mapping in a config.yaml; PoiseError if missing or not a mapping.

    kind: a dataclass that names the settings which must be there, with their types and ranges.
    """
    try:
        loaded = yaml.load(_text(Path(path)), _Loader)
    except OSError as error:
        inside = Path(path) / "config.yaml"
        hint = f"; name the file in it: {inside}" if inside.is_file() else ""
        raise PoiseError(f"cannot read config {str(path)!r}: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        raise PoiseError(
            f"cannot read config {path}: it is no UTF-8 text, at byte {error.start}; save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise PoiseError(f"config {path} is not valid YAML: {_where(error)}") from None
    except PoiseError:
        raise
    except RecursionError:
        raise PoiseError(f"config {path} is nested too deeply") from None
    except ValueError as error:
        raise PoiseError(f"cannot read config {path}: {first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise PoiseError(f"config {path} holds no settings, each as `name: value`")
    for name in loaded:
        if not isinstance(name, str):
            raise PoiseError(f"config {path} holds no settings, each as `name: value`: {name!r} is no name of one")
    return checked(loaded, kind, str(path)) if kind else loaded


def _text(path: Path) -> str:
    """What a file holds, or a pipe that somebody writes into; one that nobody does is empty, not waited for."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        os.set_blocking(file.fileno(), True)
        found = file.read(_LARGEST + 1)
    if len(found) > _LARGEST:
        raise PoiseError(f"cannot read config {path}: it is larger than a file of settings can be")
    return found.decode("utf-8-sig")


def _where(error: yaml.YAMLError) -> str:
    """Line and problem of what YAML refuses."""
    problem = getattr(error, "problem", None) or first_line(error)
    mark = getattr(error, "problem_mark", None)
    hint = "; indent by spaces" if r"'\t'" in problem else ""
    return f"line {mark.line + 1}: {problem}{hint}" if mark else f"{problem}{hint}"
