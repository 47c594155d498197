"""The command line: `poise COMMAND`.

A command is a module with `Config` and `run`. The options and their help texts are the fields of `Config` and their
docstrings; a field that is a config itself gives dotted options. `RENAMED` in the module, if any, maps names of
settings in older config files to the dotted names they have now.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from poise import __version__
from poise.cli import ending
from poise.cli.boundary import DONE, exit_status
from poise.data.examples import EXAMPLES
from poise.errors import PoiseError
from poise.runtime.settings import NumberAsWritten, Rows, hints, marks, problem, shown

COMMANDS = {
    "quickstart": ("poise.studies.quickstart", "all steps on a laptop in one command, ending in one page"),
    "data": ("poise.cli.data", "what a file was understood to hold, before anything is trained on it"),
    "init": ("poise.cli.init", "a commented file of a command's settings, to edit and pass to --config"),
    "plan": ("poise.cli.plan", "how much memory a training takes on each GPU, and what to change so that it fits"),
    "train-reward": ("poise.cli.train_reward", "preferences -> a conventional reward model and multi-head ones (BRME)"),
    "evaluate-reward": (
        "poise.cli.evaluate_reward",
        "accuracy of a reward model, and whether its uncertainties find its errors",
    ),
    "train-policy": ("poise.cli.train_policy", "PPO against a reward model, conventional or robust"),
    "best-of-n": ("poise.studies.best_of_n", "which completions each objective selects, before any RL"),
    "trust": ("poise.studies.trust", "what a reward model is worth as something to optimize, before any RL"),
    "choose": ("poise.studies.choose", "how far to train, from a few dozen side-by-side judgments"),
    "compare": ("poise.studies.compare", "finished policies side by side, scored by gold"),
    "evaluate-policy": ("poise.policy.evaluate", "the 16 benchmarks of the paper, before and after training"),
    "study": ("poise.studies.study", "arms x seeds x label noise: does a robust reward help, and by how much?"),
    "toy": ("poise.cli.toy", "PPO and robust rewards on a bandit whose optimum is known"),
    "score": ("poise.reward.score", "every head's scores of given completions"),
    "serve": ("poise.serve.server", "reward models over HTTP, for training engines"),
    "inspect": ("poise.cli.inspect", "type or pipe completions, and see every head of a reward model"),
    "chat": ("poise.cli.chat", "talk with a trained policy"),
    "ensemble": ("poise.reward.ensemble", "several reward models as one"),
    "reference": ("poise.reward.reference", "texts from which the objective `typical` measures distances"),
    "export": ("poise.reward.export", "a reward model for tools that take one scalar, as adapters, or for SGLang"),
    "merge": ("poise.cli.merge", "a policy's LoRA adapters folded into its language model"),
    "push": ("poise.reward.push", "upload a reward model to the model hub"),
    "watch": ("poise.cli.watch", "serve the page of runs in progress on this machine"),
    "report": ("poise.reports.run_pages", "the page of any run folder, or of several"),
    "completion": ("poise.cli.completion", "a script by which bash or zsh completes commands and options"),
}

# Where the settings of each command are, in modules that do not import torch.
SETTINGS = {
    "quickstart": "poise.studies.config:QuickstartConfig",
    "train-reward": "poise.reward.config:Config",
    "evaluate-reward": "poise.reward.config:EvaluateConfig",
    "train-policy": "poise.policy.config:Config",
    "best-of-n": "poise.studies.config:BestOfNConfig",
    "trust": "poise.studies.trust_config:TrustConfig",
    "choose": "poise.studies.choose_config:Config",
    "compare": "poise.studies.config:CompareConfig",
    "evaluate-policy": "poise.policy.config:EvaluateConfig",
    "study": "poise.studies.config:Config",
    "toy": "poise.toy.config:Config",
    "score": "poise.reward.config:ScoreConfig",
    "serve": "poise.serve.config:ServeConfig",
    "ensemble": "poise.reward.config:EnsembleConfig",
    "reference": "poise.reward.config:ReferenceConfig",
    "export": "poise.reward.config:ExportConfig",
    "merge": "poise.policy.config:MergeConfig",
    "push": "poise.reward.config:PushConfig",
    "report": "poise.reports.config:ReportConfig",
}

USAGE = "\n".join(
    [
        "usage: poise COMMAND [OPTIONS]      poise COMMAND --help for the options of each",
        "",
        "Reward-robust RLHF: multi-head reward models, PPO that weighs the nominal reward against the worst case,",
        "and a page that shows whether it helped.",
        "",
        "  BRME   Bayesian reward model ensemble: heads that each predict the mean and std of a reward",
        "  gold   a reference score that stands for human judgment; no training reads it",
        "",
        *(f"  {name:<17}{summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "  --config RUN/config.yaml   (any command) start from the settings of an earlier run",
        "  --version                  print the version",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted; see `poise.cli.boundary`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the boundary: every error becomes one line there
        return exit_status(error)
    return DONE


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        print(f"poise {__version__}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise PoiseError(f"no command {command!r}; " + (
            f"did you mean `poise {near[0]}`? (poise --help lists all)" if near
            else f"choose from {', '.join(COMMANDS)}"
        ))  # fmt: skip
    settings, renamed = settings_of(command)
    config = parse_config(settings, f"poise {command}", rest, renamed)
    from poise.cli.inputs import check_inputs

    config = config.for_command()
    config.check()
    check_inputs(config)
    ending.say_unread(config)
    ending.say_finished(command, config)
    ending.warn_of_models(config)
    module = importlib.import_module(COMMANDS[command][0])  # only now: torch takes seconds to import
    done = module.run(config)
    if hasattr(module, "check_outcome"):
        module.check_outcome(done)
    ending.say_ending(command, config, done)
    if "torch" in sys.modules:
        importlib.import_module("poise.runtime.distributed").leave()


def settings_of(command: str) -> tuple[type, Mapping[str, str]]:
    """The settings' class of a command, and its RENAMED; without torch if the class is listed in SETTINGS."""
    home, _, name = SETTINGS.get(command, f"{COMMANDS[command][0]}:Config").partition(":")
    module = importlib.import_module(home)
    return getattr(module, name), getattr(module, "RENAMED", {}) if name == "Config" else {}


def parse_config(
    config: type, program: str, arguments: list[str], renamed: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The config that the arguments describe, on top of `--config FILE` if given.

    renamed: dotted names that settings have now, by the names they have in older files.
    Raises PoiseError for a config file with settings this command does not have, or with values of a wrong type.
    """
    from poise.runtime.config_files import load_config_file

    arguments = [part for word in arguments for part in _config_apart(word)]
    if "--config" not in arguments:
        return _parsed(config, program, arguments)
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise PoiseError("--config needs a file, e.g. --config RUN/config.yaml")
    path = arguments[at + 1]
    settings = _with_new_names(load_config_file(path), renamed)
    added = getattr(config, "ADDED", {})
    if added and {field.name for field in fields(config)} - settings.keys() == added.keys():
        settings |= added  # the whole config of a run of an earlier version
    values, unknown = _values(settings, config, path)
    if unknown:
        raise PoiseError(f"{path} has settings {program} does not know: {_unknown(unknown, config, settings)}")
    try:
        default = config(**values)
    except TypeError as error:
        raise PoiseError(f"{path} is incomplete: {error}") from None
    return _parsed(config, program, arguments[:at] + arguments[at + 2 :], default)


def _config_apart(word: str) -> list[str]:
    """`--config=FILE` as the two words that it stands for."""
    name, sign, file = word.partition("=")
    return [name, file] if sign and name == "--config" else [word]


def _unknown(names: list[str], config: type, settings: Mapping[str, Any]) -> str:
    """The first names of settings that a file should not have, and what was meant perhaps."""
    shown_names = [f"{name or repr(name)}" for name in sorted(names)[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    said = f"{', '.join(shown_names)}{more}"
    from poise.runtime.run_kinds import command_of

    if of := command_of(settings):
        return f"{said}; it is of `poise {of}`"
    known = list(_dotted_names(config))
    near = {name: difflib.get_close_matches(name.strip("-").lower().replace("-", "_"), known, 1) for name in names}
    meant = [found[0] for found in near.values() if found]
    return f"{said}; did you mean {', '.join(meant[:_MOST_NAMES])}?" if meant else said


def _dotted_names(config: type, inside: str = "") -> Iterator[str]:
    for field in fields(config):
        if is_dataclass(field.default) and not isinstance(field.default, type):
            yield from _dotted_names(type(field.default), f"{inside}{field.name}.")
        else:
            yield f"{inside}{field.name}"


def _parsed(config: type, program: str, arguments: list[str], default: Any = None) -> Any:
    """What tyro reads; its boxes of errors as one line."""
    import tyro

    said = io.StringIO()
    _refuse_values_of_switches(config, arguments)
    try:
        with contextlib.redirect_stderr(said):
            about = _description(config)
            if default is None:
                return tyro.cli(config, prog=program, args=arguments, description=about)
            return tyro.cli(config, prog=program, args=arguments, description=about, default=default)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise PoiseError(f"{_complaint(said.getvalue())} ({program} --help lists the options)") from None


def _refuse_values_of_switches(config: type, arguments: list[str]) -> None:
    """Raise PoiseError for `--settle false`: what is true or false takes no value."""
    switches = {f"--{name}".replace("_", "-") for name, kind in hints(config).items() if kind is bool}
    for word, following in itertools.pairwise([*arguments, ""]):
        name, sign, value = word.replace("_", "-").partition("=")
        if name in switches and (value if sign else following).lower() in ("true", "false", "yes", "no", "on", "off"):
            raise PoiseError(f"a switch takes no value: {name} turns it on, {name.replace('--', '--no-', 1)} off")


def _description(config: type) -> str:
    """What --help says above the options: the settings' docstring, and a row of each kind of file that they name."""
    kinds = [mark.kind for kind in hints(config).values() for mark in marks(kind) if isinstance(mark, Rows)]
    rows = [f"A row of {kind}: {EXAMPLES[kind]}" for kind in dict.fromkeys(kinds)]
    if rows:
        rows.append("docs/data.md has every form; `poise data FILE` prints what a file is understood to hold.")
    return "\n\n".join([inspect.getdoc(config) or "", *rows])


_MOST_NAMES = 5  # of settings that a message lists
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}|INT": "a whole number or None"}
_KINDS["{None}|FLOAT"] = "a number or None"


def _complaint(box: str) -> str:
    """What is wrong, on one line, from a box of tyro's, which it draws in UTF-8 or in ASCII."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯| ") for line in plain.splitlines()]
    _title, *inside = [line for line in lines if line] or [""]

    def is_rule(line: str) -> bool:
        return not line.strip("─-")

    inside = list(itertools.dropwhile(is_rule, inside))
    found = list(itertools.takewhile(lambda line: not is_rule(line), inside))
    said, rest = " ".join(found), " ".join(inside[len(found) :])
    if wrong := re.match(r"Error parsing (--\S+):.*?(?:from \[|: )(['\"].*?['\"])(?:\]|$)", said):
        option, value = wrong.groups()
        if kind := re.search(rf"{re.escape(option)} (\S+)", rest):
            return f"{option} must be {_KINDS.get(kind[1], kind[1])}, got {value}"
    if listed := re.match(r"Error parsing (--\S+): Could not find valid parse for arguments: \['(.*)'\]", said):
        return f"{listed[1]} takes values with spaces between, got {listed[2].replace(', ', ',')!r}"
    if alone := re.match(r"Missing value for argument '(\w+)'", said):
        return f"{alone[1].upper()} is missing: it is given by itself, without --{alone[1]}"
    if said.startswith("Unrecognized") and (near := re.search(r"Perhaps you meant: (--[\w.-]+)", rest)):
        return f"{said}; did you mean {near[1]}?"
    return said or "bad options"


def _with_new_names(settings: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a file, those with an older name moved to the place they have now, unless that is given too."""
    moved: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, key = renamed.get(name, name).rpartition(".")
        if name in renamed and not isinstance(settings.get(group, {}), dict):
            continue  # the group is no mapping, which `_values` reports
        if name in renamed:
            moved[group] = {key: value, **moved.get(group, {}), **settings.get(group, {})}
        elif name not in moved:
            moved[name] = value
    return moved


def _values(settings: dict[Any, Any], config: type, path: str, inside: str = "") -> tuple[dict[str, Any], list[str]]:
    """Values to construct `config` from, and the dotted names of settings it does not have.

    A field whose default is a config itself takes a mapping, whose settings replace those of the default.
    """
    known, kinds = {field.name: field.default for field in fields(config)}, get_type_hints(config)
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in settings.items():
        if name not in known:
            unknown.append(f"{inside}{name}")
        elif is_dataclass(default := known[name]) and not isinstance(default, type):
            if not isinstance(value, dict):
                raise PoiseError(f"{path}: {inside}{name} must hold settings, each as `name: value`")
            inner, others = _values(value, type(default), path, f"{inside}{name}.")
            values[name] = replace(default, **inner)
            unknown += others
        else:
            try:
                values[name] = _converted(value, kinds[name])
            except (TypeError, ValueError, OverflowError):
                wanted = problem(value, kinds[name])
                expected = f"must be {wanted}: " if wanted else ""
                quoted = "; YAML reads yes, no, on and off so: put quotes around them" if wanted == "text" else ""
                hint = quoted if isinstance(value, bool) else ""
                raise PoiseError(f"{path}: {expected}{inside}{name} cannot be {shown(value)}{hint}") from None
    return values, unknown


def _converted(value: Any, kind: Any) -> Any:
    """A value of a YAML file as the type of a config's field; TypeError or ValueError if it is of another type.

    YAML reads `1e-3` as text and an unquoted `0.25` as a number: floats may be text, and text may be a number. `None`
    is what the command line calls it; YAML's word is null.

    >>> _converted("1e-3", float), _converted([0, 0.25], tuple[str, ...]), _converted("None", int | None)
    (0.001, ('0', '0.25'), None)
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_converted(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError
    elif get_origin(kind) in (Union, UnionType):
        if value in (None, "None") and NoneType in get_args(kind):
            return None
        [kind] = (one for one in get_args(kind) if one is not NoneType)
        return _converted(value, kind)
    elif kind in (float, str):
        if type(value) not in (str, int, float, NumberAsWritten):
            raise TypeError
        return value.text if kind is str and isinstance(value, NumberAsWritten) else kind(value)
    elif kind in (int, bool) and type(value) is not kind:
        raise TypeError
    return value


if __name__ == "__main__":
    sys.exit(main())
