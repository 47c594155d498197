"""The command line: `poise COMMAND`. Each command is a study's config; its help texts are the config's own."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from poise import __version__
from poise.errors import PoiseError

COMMANDS = {
    "quickstart": ("poise.studies.quickstart", "the whole story on a laptop, ending in one page"),
    "train-reward": ("poise.cli.train_reward", "preferences -> conventional and multi-head reward models"),
    "evaluate-reward": (
        "poise.cli.evaluate_reward",
        "is a reward model right, and do its uncertainties mean something?",
    ),
    "train-policy": ("poise.cli.train_policy", "PPO against a reward model, conventional or robust"),
    "best-of-n": ("poise.studies.best_of_n", "what each objective would select, before any RL"),
    "compare": ("poise.studies.compare", "judge finished policies by gold, side by side"),
    "evaluate-policy": ("poise.policy.evaluate", "the 16 benchmarks of the paper, before and after training"),
    "study": ("poise.studies.study", "arms x seeds x label noise: does a robust reward help, and by how much?"),
    "toy": ("poise.cli.toy", "PPO and robust rewards where the optimum is known"),
    "score": ("poise.reward.score", "every head's opinion of given completions"),
    "ensemble": ("poise.reward.ensemble", "several reward models as one"),
    "export": ("poise.reward.export", "a reward model for tools that take one scalar, as adapters, or for SGLang"),
    "merge": ("poise.policy.merge", "a policy's LoRA adapters folded into its language model"),
    "push": ("poise.reward.push", "upload a reward model to the model hub"),
    "report": ("poise.reports.quickstart_page", "rebuild the page of a quickstart folder"),
}

USAGE = "\n".join(
    [
        "usage: poise COMMAND [OPTIONS]      poise COMMAND --help for the options of each",
        "",
        "Reward-robust RLHF: multi-head reward models, PPO that weighs the nominal reward against the worst case,",
        "and a page that shows whether it helped.",
        "",
        *(f"  {name:<17}{summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "  --config RUN/config.yaml   (any command) start from the settings of an earlier run",
        "  --version                  print the version",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"poise {__version__}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise PoiseError(f"no command {command!r}; choose from {', '.join(COMMANDS)}")
        study = importlib.import_module(COMMANDS[command][0])  # only now: torch takes seconds to import
        study.run(parse_config(study.Config, f"poise {command}", rest))
        importlib.import_module("poise.runtime.distributed").leave()
    except PoiseError as error:
        print(f"poise: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("poise: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse_config(config: type, program: str, arguments: list[str]) -> Any:
    """The config that the arguments describe, on top of `--config FILE` if given.

    Raises PoiseError for a config file with settings this command does not have.
    """
    import tyro

    from poise.runtime.run_folder import load_config_file

    if "--config" not in arguments:
        return tyro.cli(config, prog=program, args=arguments)
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise PoiseError("--config needs a file, e.g. --config RUN/config.yaml")
    settings = load_config_file(arguments[at + 1])
    known = {field.name: field.type for field in fields(config)}
    if unknown := settings.keys() - known.keys():
        raise PoiseError(f"{arguments[at + 1]} has settings {program} does not know: {', '.join(sorted(unknown))}")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        default = config(**settings)
    except TypeError as error:
        raise PoiseError(f"{arguments[at + 1]} is incomplete: {error}") from None
    return tyro.cli(config, prog=program, args=arguments[:at] + arguments[at + 2 :], default=default)


if __name__ == "__main__":
    sys.exit(main())
