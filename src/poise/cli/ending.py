"""How a command ends: what was measured, its warnings, the folder, the page, and the next command.

Every command that makes something has a function here that reads its results; one function prints what they say.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.cli.boundary import leave_stdout
from poise.errors import PoiseError
from poise.models.card_warnings import card_warnings
from poise.models.run_heads import VALIDATOR, reward_folder
from poise.runtime.display import on_one_line, say, short_names
from poise.runtime.run_folder import Json, Run, is_main_process
from poise.runtime.run_kinds import why_without
from poise.runtime.settings import ModelPath, marks, typed_fields, unread

MOST_ROWS = 7
# Without a page of their own making.
_WITHOUT_PAGE = {"train-reward", "train-policy", "best-of-n", "compare", "evaluate-policy", "trust"}
_KEPT = {"train-reward", "train-policy", "best-of-n", "evaluate-policy", "evaluate-reward", "quickstart", "toy"}


@dataclass(frozen=True)
class Ending:
    """What is said at the end. rows: name and value of what was measured; next: commands to paste."""

    rows: list[tuple[str, str]]
    next: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def say_unread(config: Any) -> None:
    """Warn of settings that were given and that nothing will read."""
    if is_main_process():
        for line in unread(config):
            say(f"warning: {line}")


def say_finished(command: str, config: Any) -> None:
    """Say at once that the run in --output is complete already; PoiseError if that folder cannot be taken."""
    output = getattr(config, "output", "")
    if not (getattr(config, "RUN_FOLDER", False) and output and is_main_process()):
        return
    run = Run(Path(output))
    run.check_command(config)
    if command in _KEPT:
        run.check_config(config)
        if run.results is not None and not run.differs_beside_inputs(config):
            _refuse_incomplete(command, run.folder, run.results)
            _say(f"{on_one_line(output)} is finished; nothing is computed again (another --output makes a new run)")


def _refuse_incomplete(command: str, folder: Path, results: Json) -> None:
    """Raise PoiseError for a finished run of which a model that it ended with was deleted."""
    made = {"train-policy": ["policy"], "train-reward": [*(results.get("models") or {})]}.get(command, [])
    for name in [*made, *([VALIDATOR] if made and results.get(VALIDATOR) else [])]:
        if not any((folder / name).glob("*.safetensors")):
            raise PoiseError(f"{folder} is finished and not whole: {why_without(folder, name)}")


def warn_of_models(config: Any) -> None:
    """Print the warnings on the cards of the reward models that a command is going to use."""
    if is_main_process():
        for path in _reward_models(config):
            for text in card_warnings(path):
                _say(f"warning: {on_one_line(path)}: {text}")


def say_ending(command: str, config: Any, done: Any) -> None:
    """Print how a command ended, and write its page."""
    if command not in ENDINGS or not is_main_process():
        return
    ending = ENDINGS[command](config, done)
    folder = done.folder if isinstance(done, Run) else None
    page = None
    if folder and command in _WITHOUT_PAGE:
        page = _page(folder)
    elif folder:
        names = ("report.html", "evaluation.html", "toy.png")
        page = next((folder / name for name in names if (folder / name).exists()), None)
    lines = [""]
    width = max((len(name) for name, _ in ending.rows), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in ending.rows[:MOST_ROWS]]
    if len(ending.rows) > MOST_ROWS:
        lines.append(f"  … and {len(ending.rows) - MOST_ROWS} more on the page")
    lines += [f"warning: {text}" for text in dict.fromkeys(ending.warnings)]
    if folder:
        lines.append(f"folder: {folder}")
    if page:
        lines.append(f"page:   {page}")
    lines += [f"next:   {text}" for text in ending.next]
    _say("\n".join(map(on_one_line, lines)))


def _say(text: str) -> None:
    """Print; if nobody reads stdout any more, what is printed is lost, and the work is not."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        leave_stdout()


def _page(folder: Path) -> Path | None:
    """Write the page. A page that cannot be made is no reason for a command to fail."""
    from poise.reports import run_pages  # draws figures

    try:
        return run_pages.build([folder])
    except (PoiseError, OSError) as error:
        _say(f"no page: {error}")
        return None


def _reward_models(config: Any) -> Iterator[str]:
    """Reward models that settings name; of best-of-n and of a run's heads those that the objectives select by."""
    if hasattr(config, "objectives") and hasattr(config, "per_prompt"):
        names = dict.fromkeys(text.partition(":")[0] for text in config.objectives)
        yield from (str(Path(folder) / name) for folder in config.reward for name in names)
    for kind, value in typed_fields(config).values():
        if any(isinstance(mark, ModelPath) and mark.kind == "reward model" for mark in marks(kind)):
            yield from value if isinstance(value, tuple) else (_taken(config, value),) if value else ()


def _taken(config: Any, reward: str) -> str:
    """Of a `poise train-reward` run the heads that an objective takes, where there is one to choose by."""
    if hasattr(config, "objective"):
        with contextlib.suppress(PoiseError):  # the command itself says what is wrong with it
            return reward_folder(reward, config.objective, getattr(config, "heads", None))
    return reward


# ---- what each command measured ----


def _train_reward(config: Any, done: Run) -> Ending:
    results = done.results or {}
    rows = [(name, _accuracy(model)) for name, model in results["models"].items()]
    longer = next((model.get("length_accuracy") for model in results["models"].values()), None)
    if longer is not None:
        rows.append(("longer answer", f"{longer:.1%}, for comparison"))
    if of_validator := results.get(VALIDATOR):
        rows.append((VALIDATOR, _accuracy(of_validator["models"][VALIDATOR])))
    rows.append(("pairs", f"{results['num_train']} to train on, {results['num_validation']} for validation"))
    names = results["models"]
    best = max(names, key=lambda name: names[name].get("validation_accuracy") or 0.0)
    folder = str(done.folder if {"brme", "posterior"} <= names.keys() else done.folder / best)
    train = _command("train-policy", "--reward", folder, "--prompts", config.preferences, "--model", config.model)
    return Ending(
        rows, (_command("inspect", folder), train), tuple(_warned(done.folder, [*results["models"], VALIDATOR]))
    )


def _accuracy(model: Json) -> str:
    accuracy, (low, high) = model.get("validation_accuracy"), model.get("validation_accuracy_interval") or (None, None)
    if accuracy is None:
        return "not judged"
    interval = f" (95 % interval {low:.1%} to {high:.1%})" if low is not None and high is not None else ""
    return f"{accuracy:.1%} of validation pairs in the right order{interval}"


def _warned(folder: Path, names: Any) -> Iterator[str]:
    by_text: dict[str, list[str]] = {}
    for name in names:
        for text in card_warnings(folder / name):
            by_text.setdefault(text, []).append(name)
    yield from (f"{', '.join(names)}: {text}" for text, names in by_text.items())


def _train_policy(config: Any, done: Run) -> Ending:
    from poise.models.model_card import judges_warnings
    from poise.reports.policy_run import ended_early

    results, steps = done.results or {}, done.metrics()
    start, end = steps[:3], steps[-3:]
    changed = f"{_mean(start, 'reward'):+.2f} in the first steps, {_mean(end, 'reward'):+.2f} in the last"
    texts = f"{_mean(end, 'tokens'):.0f} tokens, {_mean(end, 'ended'):.0%} ended by themselves"
    gone = "" if steps and steps[0]["step"] == 0 else f"not known: {done.folder}/metrics.jsonl lacks steps"
    gone = "of no step that was kept" if results.get("steps") == 0 else gone
    rows = [
        ("reward", gone or changed),
        ("evaluation", f"reward {results['reward']:+.2f}, KL {results['kl']:.1f} nats a completion"),
        ("completions", gone or texts),
        ("alarms", str(len(results["alarms"])) if results["alarms"] else "none (which proves nothing)"),
        ("gold", "not read: whether people like the texts is not known"),
    ]
    folder = str(done.folder)
    if how := ended_early(results, vars(config)):
        rows.insert(3, ("ended", how))
    if best := results.get("best"):
        rows.insert(3, ("validator", f"likes step {best['step']} best, at KL {best['kl']:.1f}: {done.folder / 'best'}"))
    warnings = [*judges_warnings(_taken(config, config.reward), config.validator), *card_warnings(done.folder)]
    if (ended := _mean(steps, "ended")) < 0.5:
        which = "every completion was" if ended == 0.0 else f"{1 - ended:.0%} of the completions were"
        warnings.append(f"{which} cut at --max-tokens {config.max_tokens}; train with more")
    merged = _command("merge", folder, "--output", f"{folder}-merged")
    return Ending(rows, (_command("chat", folder), merged), tuple(warnings))


def _mean(steps: list[Json], key: str) -> float:
    values = [row[key] for row in steps if row.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")


def _best_of_n(config: Any, done: Run) -> Ending:
    results = done.results or {}
    rows = []
    for curve in results["curves"]:
        first, last = curve["best_of_n"][0], curve["best_of_n"][-1]
        gold = f", gold {first['gold']:+.2f} to {last['gold']:+.2f}" if "gold" in last else ""
        rows.append((curve["name"], f"best of {last['n']}: reward {first['proxy']:+.2f} to {last['proxy']:+.2f}{gold}"))
    rows.append(("selected", str(done.folder / "selected.jsonl")))
    reward, _, objective = config.objectives[-1].partition(":")
    train = _command(
        "train-policy", "--reward", str(Path(config.reward[0]) / reward), "--objective", objective,
        "--prompts", config.prompts, "--model", config.model,
    )  # fmt: skip
    return Ending(rows, (train,), tuple(text for path in _reward_models(config) for text in card_warnings(path)))


def _compare(config: Any, done: Run) -> Ending:
    return Ending(_compared(done), (_command("chat", config.arms[-1]),))


def _compared(done: Run) -> list[tuple[str, str]]:
    results = done.results or {}
    rows = []
    for arm in results["arms"]:
        final = arm["final"]
        gold = f"gold {final['gold']:+.2f}, " if final.get("gold") is not None else ""
        rows.append((arm["name"], f"{gold}reward {final['proxy']:+.2f}, KL {final['kl']:.1f}"))
    for one in results["differences"]:
        low, high = one["interval"]
        rows.append((f"{one['arm']} − {one['against']}", f"gold {one['gold']:+.2f} ({low:+.2f} to {high:+.2f})"))
    if not results["differences"]:
        rows.append(("gold", "none was given, so nothing here says which texts are better"))
    return rows


def _quickstart(config: Any, done: Run) -> Ending:
    rows = _compared(Run(done.folder / "comparison"))
    models = (Run(done.folder / "reward").results or {}).get("models") or {}
    seconds = (done.results or {}).get("total_seconds") or 0.0
    rows.append(("time", f"{seconds / 60:.0f} min"))
    following = [_command("chat", str(done.folder / f"policy-{config.arms[-1]}"))]
    if "brme" not in config.arms:  # the paper's, about four minutes more
        folder = [] if config.output == type(config).output else ["--output", config.output]
        following.append(_command("quickstart", *folder, "--arms", *config.arms, "brme"))
    return Ending(rows, tuple(following), tuple(_warned(done.folder / "reward", models)))


def _evaluate_reward(config: Any, done: Run) -> Ending:
    from poise.reward.evaluate import in_short

    results = done.results or {}
    paths = [one["reward"] for one in results["rewards"]]
    names = dict(zip(paths, short_names(paths), strict=True))
    rows = [(names[one["reward"]], in_short(one)) for one in results["rewards"]]
    for one in results["differences"]:
        for name, value in one.items():
            if isinstance(value, dict) and "accuracy" in name:
                low, high = value["interval"]
                text = f"{name} {value['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
                rows.append((f"{names[one['reward']]} − {names.get(one['versus'], one['versus'])}", text))
    warnings = [f"{path}: {text}" for path in config.rewards for text in card_warnings(path)]
    best = max(results["rewards"], key=lambda one: (one.get("pairs") or one.get("sets") or {}).get("accuracy") or 0.0)
    return Ending(rows, (_command("inspect", best["reward"]),), tuple(warnings))


def _trust(config: Any, done: Run) -> Ending:
    from poise.models.model_card import judges_warnings
    from poise.reports.trust_run import beyond_reach, findings

    results = done.results or {}
    rows = [("answer", said.text.replace("\xa0", " ")) for said in findings(results)]
    again = _command("trust", "--config", str(done.folder / "config.yaml"), "--page")
    judged = results["labels"] is not None
    warnings = [text for text in (beyond_reach(results),) if text]
    train = _command("train-policy", "--reward", config.reward, "--prompts", config.prompts, "--model", config.model)
    warnings += judges_warnings(config.reward, config.validator)
    return Ending(rows, (train,) if judged else (again,), tuple(warnings))


def _evaluate_policy(_: Any, done: Run) -> Ending:
    rows = []
    for policy in (done.results or {})["policies"]:
        average = policy["average"]
        against = f", {100 * average['difference']:+.1f} points" if "difference" in average else ""
        rows.append((policy["name"], f"{average['mean']:.1%} right on average{against}"))
    return Ending(rows, (_command("report", str(done.folder)),))


def _study(_: Any, done: Run) -> Ending:
    results = done.results or {}
    rows = [
        (f"noise {noise}, {name}", f"final gold {arm['final_gold']['mean']:+.2f}")
        for noise, arms in results["summary"].items()
        for name, arm in arms.items()
    ]
    return Ending(rows, (_command("report", str(done.folder)),))


def _toy(_: Any, done: Run) -> Ending:
    rows = []
    for one in (done.results or {})["objectives"]:
        if one["name"] not in ("reference", "gold", "single"):
            gain = one["ppo"]["against_single"]
            text = f"gold {gain['mean']:+.3f} against the single head ({gain['low']:+.3f} to {gain['high']:+.3f})"
            rows.append((one["name"], text))
    return Ending(rows, (_command("quickstart"),))


def _score(config: Any, done: Path) -> Ending:
    warnings = [f"{config.reward}: {text}" for text in card_warnings(config.reward)]
    again = _command("inspect", config.reward)
    return Ending([("scores", str(done)), ("objective", config.objective)], (again,), tuple(warnings))


def _ensemble(_: Any, done: Path) -> Ending:
    return Ending([("ensemble", str(done))], (_command("inspect", str(done)),), tuple(card_warnings(done)))


def _export(config: Any, done: Path) -> Ending:
    inspect = () if config.engine == "sglang" else (_command("inspect", str(done)),)
    return Ending([("checkpoint", str(done))], inspect, tuple(card_warnings(done)))


def _merge(_: Any, done: Path) -> Ending:
    return Ending([("model", str(done))], (_command("chat", str(done)),), tuple(card_warnings(done)))


def _command(*words: str) -> str:
    return shlex.join(["poise", *words])


ENDINGS: dict[str, Callable[[Any, Any], Ending]] = {
    "train-reward": _train_reward, "train-policy": _train_policy, "best-of-n": _best_of_n, "compare": _compare,
    "quickstart": _quickstart, "evaluate-reward": _evaluate_reward, "evaluate-policy": _evaluate_policy,
    "study": _study, "trust": _trust, "toy": _toy, "score": _score, "ensemble": _ensemble, "export": _export,
    "merge": _merge,
}  # fmt: skip
