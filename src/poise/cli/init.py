"""`poise init`: a commented file of a command's settings, to edit and pass to `--config`."""

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
import yaml

from poise.cli.main import settings_of
from poise.errors import PoiseError
from poise.runtime.progress import console
from poise.runtime.run_folder import config_dict, write_atomic
from poise.runtime.settings import Settings

_Command = Literal["train-reward", "train-policy", "study", "serve"]
COMMANDS = get_args(_Command)
_WIDTH = 100


@dataclass(frozen=True)
class Config(Settings):
    """Write a commented file of a command's settings, all at their defaults, to edit and pass to --config."""

    command: tyro.conf.Positional[_Command]
    """The command whose settings to write."""
    output: str = ""
    """File to write; default: COMMAND.yaml here. A file that exists is not replaced."""


def run(config: Config) -> Path:
    """Write the file; returns its path."""
    path = Path(config.output or f"{config.command}.yaml")
    if path.exists():
        raise PoiseError(f"{path} exists; choose another --output")
    write_atomic(path, text_of(config.command))
    console.print(f"{path}: edit it, then  poise {config.command} --config {path}", markup=False, soft_wrap=True)
    return path


def text_of(command: str) -> str:
    """The YAML of a command's default settings, each after its help text."""
    config, _ = settings_of(command)
    hidden = set(getattr(sys.modules[config.__module__], "SET_BY_STUDY", ()))
    title = _comment(f"{inspect.getdoc(config)}\n\npoise {command} --config THIS_FILE")
    return "\n\n".join(["\n".join(title), *_settings(config(), hidden)]) + "\n"


def _settings(config: Any, hidden: Collection[str], group: str = "") -> Iterator[str]:
    """One block of lines per setting; those of a nested config after its own help text, indented."""
    helps, values = _helps(type(config)), config_dict(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if group + field.name in hidden:
            continue
        comment = _comment(helps.get(field.name, ""))
        if is_dataclass(value):
            inner = "\n\n".join(_settings(value, hidden, f"{field.name}."))
            yield "\n".join([*comment, f"{field.name}:", textwrap.indent(inner, "  ")])
        else:
            line = yaml.safe_dump(
                {field.name: values[field.name]}, default_flow_style=False, width=_WIDTH, allow_unicode=True
            )
            yield "\n".join([*comment, line.rstrip("\n")])


def _comment(text: str) -> list[str]:
    lines = [line for part in text.split("\n\n") for line in textwrap.wrap(" ".join(part.split()), _WIDTH)]
    return [f"# {line}" for line in lines]


def _helps(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, those of its bases too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for one, after in itertools.pairwise(statements):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                found[one.target.id] = str(ast.literal_eval(after.value))
    return found
