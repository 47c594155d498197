"""`poise completion`: a script by which bash or zsh completes commands, options and file names.

source <(poise completion)      # in ~/.bashrc; in ~/.zshrc after `autoload -U bashcompinit && bashcompinit`
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import get_type_hints

from poise.runtime.settings import Settings

SCRIPT = """\
_poise() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} options
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  case $word in
    -*) COMPREPLY=($(compgen -W "$options --help --config" -- "$word")) ;;
    *) COMPREPLY=() ;;
  esac
}}
complete -o default -F _poise poise"""


@dataclass(frozen=True)
class Config(Settings):
    """Print a script by which bash or zsh completes poise: source <(poise completion)."""


def run(config: Config) -> None:  # noqa: ARG001  commands have one signature
    """Prints the script."""
    print(script())


def script() -> str:
    """The completion script, made of the commands and their settings."""
    from poise.cli.main import COMMANDS, settings_of

    cases = [f'    {name}) options="{" ".join(options(settings_of(name)[0]))}" ;;' for name in COMMANDS]
    return SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(cases))


def options(settings: type, inside: str = "") -> Iterator[str]:
    """The options of a command's settings; a field that holds settings gives dotted ones.

    >>> from poise.runtime.settings import Seed
    >>> @dataclass(frozen=True)
    ... class Small(Settings):
    ...     seed: Seed = 0
    ...     fast: bool = False
    >>> list(options(Small))
    ['--seed', '--fast', '--no-fast']
    """
    kinds = get_type_hints(settings)
    for field in fields(settings):
        name = f"{inside}{field.name.replace('_', '-')}"
        if is_dataclass(kinds[field.name]):
            yield from options(kinds[field.name], f"{name}.")
            continue
        yield f"--{name}"
        if kinds[field.name] is bool:
            yield f"--{inside}no-{field.name.replace('_', '-')}"
