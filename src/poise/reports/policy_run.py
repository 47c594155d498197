"""What the page of a `poise train-policy` run shows, from its folder alone, also while it is still training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from poise.models.model_card import judges_warnings, public_name
from poise.reports import run_plots
from poise.reports.blocks import Answer, Answers, Cell, Chart, Charts, Made, Page, Part, Section, Table, Text
from poise.reports.plot_style import column_of
from poise.reports.quickstart_page import Verdict, duration, number, percent, read_json, signed
from poise.runtime.display import short_names, visible_values
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, load_config_file

NUM_PROMPTS = 6
_READ_AT_EACH_END = 2 * 2**20  # bytes of samples.jsonl: a run's first and last steps
_GLOSSARY = ("reward", "KL", "gap", "disagreement", "routing std", "ended", "validator", "monitor")


class PolicyRun:
    """A run folder's files, read once."""

    def __init__(self, folder: Path, name: str = ""):
        self.folder, self.name = folder, name or folder.resolve().name
        self.settings: Json = visible_values(load_config_file(folder / "config.yaml"))
        metrics = folder / "metrics.jsonl"
        self.steps = list(read_rows(metrics)) if metrics.exists() else []
        self.results = read_json(folder / "results.json")
        self.alarms = [row["step"] for row in self.steps if row.get("alarm")]

    @property
    def algorithm(self) -> str:
        return str(self.settings.get("algorithm", "ppo")).upper()

    def column(self, key: str) -> np.ndarray:
        return column_of(self.steps, key)

    def mean_of(self, key: str, part: slice) -> float | None:
        """Mean of one number over some steps; None if none of them has it."""
        values = self.column(key)[part]
        return float(np.nanmean(values)) if len(values) and not np.isnan(values).all() else None


def page(folder: Path) -> Page:
    """The page of one policy run."""
    run = PolicyRun(folder)
    total = run.settings.get("num_steps")
    done = len(run.steps)
    unfinished = "" if run.results else f"This run is not finished: {done} of {total} steps."
    sections = [Section("What happened", [_facts(run)])]
    if run.steps:
        own = f"{run.name}-{crc32(bytes(folder)):x}"  # others on the page may have the name
        sections.append(Section("Over training", [Charts(charts([run], own), _caption(run))]))
    if samples := _samples(run):
        sections.append(Section("What it wrote, first and last", [samples]))
    sections.append(Section("How it was made", [Made.of(folder)]))
    return Page(
        f"policy run {run.name}: {run.algorithm} on {run.settings.get('objective')}", findings(run), sections,
        warnings(run), unfinished, _GLOSSARY,
    )  # fmt: skip


def together(folders: Sequence[Path]) -> Page:
    """Several policy runs in the same charts."""
    names = short_names([str(folder if folder.name else folder.resolve().name) for folder in folders])
    runs = [PolicyRun(folder, name) for folder, name in zip(folders, names, strict=True)]
    rows = [[run.name, *(value for _, value in _numbers(run))] for run in runs]
    table = Table("Policies", ["Policy", *(name for name, _ in _numbers(runs[0]))], rows)
    note = Text("Rewards of different reward models or objectives have different units: compare shapes.", "note")
    parts: list[Part] = [table, Charts(charts([run for run in runs if run.steps], "together")), note]
    return Page(f"{len(runs)} policies side by side", [], [Section("Side by side", parts)], glossary=_GLOSSARY)


# ---- in words ----


def findings(run: PolicyRun) -> list[Verdict]:
    """What a run came to, in sentences that claim nothing about gold."""
    how = ended_early(run.results or {}, run.settings)
    if not run.steps:
        return [Verdict("unclear", f"It {how}." if how else "No step has been taken yet.")]
    first, last = run.mean_of("reward", slice(0, 3)), run.mean_of("reward", slice(-3, None))
    distance = run.mean_of("kl", slice(-3, None))
    text = (
        f"Its reward went from {signed(first)} to {signed(last)} in {len(run.steps)} steps (means of three), at KL "
        f"{number(distance, 1)}."
    )
    found = [Verdict("unclear", text)]
    if run.alarms:
        when = f"at step {run.alarms[0]}"
        if len(run.alarms) > 1:
            when = f"from step {run.alarms[0]} on, at {len(run.alarms)} of {len(run.steps)} steps"
        found.insert(0, Verdict("worse", f"The monitor saw signs of over-optimization {when}."))
    found += [Verdict("unclear", text) for text in (*([f"It {how}."] if how else []), *_of_the_validator(run))]
    found.append(
        Verdict("unclear", "A higher reward is what it was trained for, and no evidence of better text: read some.")
    )
    return found


def ended_early(results: Json, settings: Json) -> str:
    """What a finished run did before its last step, in words; empty for one that made them all, or does not say."""
    by, steps = results.get("ended_by"), results.get("steps")
    if by == "max_kl":
        back = f"that of {steps} step{'s' * (steps != 1)}" if steps else "the start's"
        return f"passed --max-kl {settings.get('max_kl'):g} and went back: the policy is {back}"
    return f"was ended by an alarm of the monitor (--on-alarm {by})" if by in ("stop", "rollback") else ""


def _of_the_validator(run: PolicyRun) -> list[str]:
    text = []
    if (seen := run.mean_of("transfer", slice(-3, None))) is not None:
        text.append(f"The validator saw {percent(max(seen, 0.0), 0)} of what the reward gained, at the end.")
    if best := (run.results or {}).get("best"):
        text.append(f"The validator likes the policy of step {best['step']} best, at KL {number(best['kl'], 1)}.")
    return text


def warnings(run: PolicyRun) -> list[str]:
    """The warnings on the cards of reward model and validator, and that completions were cut."""
    found = judges_warnings(str(run.settings.get("reward", "")), run.settings.get("validator"))
    ended = run.column("ended") if run.steps else np.array([])
    if len(ended) and (cut := float(1 - np.nanmean(np.nan_to_num(ended, nan=1.0)))) > 0.5:
        which = "Every completion of every step" if cut == 1.0 else f"{percent(cut, 0)} of the completions"
        verb = "was" if cut == 1.0 else "were"
        found.append(
            f"{which} {verb} cut at {run.settings.get('max_tokens')} tokens: the reward model saw mostly "
            f"text that breaks off. Train with a larger --max-tokens."
        )
    return found


def _numbers(run: PolicyRun) -> list[tuple[str, Cell]]:
    results, last = run.results or {}, slice(-3, None)
    ended, tokens = run.mean_of("ended", last), run.mean_of("tokens", last)
    seconds = sum(np.nansum(run.column(f"{lap}_seconds")) for lap in ("sample", "reference", "score", "update"))
    evaluated = results.get("reward")
    return [
        ("Objective", str(run.settings.get("objective"))),
        ("Reward model", _reward_of(run)),
        ("Steps", f"{len(run.steps)} of {run.settings.get('num_steps')}"),
        ("Reward, first 3 steps", signed(run.mean_of("reward", slice(0, 3)))),
        ("Reward, last 3 steps", signed(run.mean_of("reward", last))),
        ("Reward, evaluation prompts", signed(evaluated)),
        ("KL", number(results.get("kl", run.mean_of("kl", last)), 1)),
        ("Ended", percent(ended, 0)),
        ("Tokens", number(tokens, 0)),
        ("Alarms", str(len(run.alarms)) if run.steps else number(None)),
        ("Time a step", duration(float(seconds) / len(run.steps)) if run.steps and seconds else number(None)),
    ]


def _reward_of(run: PolicyRun) -> str:
    """The reward model's name, and of a run folder which heads of it."""
    name, heads = public_name(str(run.settings.get("reward"))), (run.results or {}).get("heads")
    return f"{name}/{heads}" if heads else name


def _facts(run: PolicyRun) -> Table:
    return Table("What happened", ["Measured", "Value"], [[name, value] for name, value in _numbers(run)])


def _caption(run: PolicyRun) -> str:
    text = "Over training steps, on training prompts; the band is one std over a step’s completions."
    if (size := run_plots.steps_per_point(len(run.steps))) > 1:
        text += f" Every point is the mean of {size} steps."
    return f"{text} Red: steps with an alarm of the monitor, the line at the first." if run.alarms else text


# ---- figures ----


def charts(runs: Sequence[PolicyRun], identifier: str) -> list[Chart]:
    """One small figure per measure, every run a line in it; with a single run its spread and alarms too."""
    alone = runs[0] if len(runs) == 1 else None
    alarms = [float(step) for step in alone.alarms] if alone else []
    found: list[Chart] = []

    def add(title: str, keys: dict[str, str], what: str, spread: str = "", **options: Any) -> None:
        lines = [
            run_plots.over_steps(run.steps, key, label if alone else run.name, at if alone else i, spread)
            for i, run in enumerate(runs)
            for at, (key, label) in enumerate(keys.items())
            if not np.isnan(run.column(key)).all() and (at == 0 or alone)
        ]
        if lines:
            name = f"{identifier}-{len(found)}"
            found.append(Chart(run_plots.panel(lines, title, name, alarms=alarms, **options), what))

    add("Reward", {"reward": ""}, "Mean reward over training steps.", "reward_std" if alone else "", level=0.0)
    if alone:
        both = {"reward": "reward", "validator": "validator"}
        watched = not np.isnan(alone.column("validator")).all()
        add("What the validator sees of it", both if watched else {}, "Reward and validator over training steps.")
    else:
        add("Validator", {"validator": ""}, "The validator’s gain over training steps.", level=0.0)
    add("KL to the initial policy", {"kl": ""}, "KL over training steps.")
    spreads = {"gap": "gap", "disagreement": "disagreement", "routing_std": "routing std"}
    if any(np.nansum(run.column("routing_std")) == 0 for run in runs):  # point heads: all have std 0
        spreads = {"disagreement": "disagreement"}
    if any(np.nansum(run.column("disagreement")) > 0 for run in runs):
        if alone:
            add("Uncertainty of the heads", spreads, "Gap, disagreement, routing std over training steps.", floor=0.0)
        else:
            add("Disagreement of the heads", {"disagreement": ""}, "Disagreement over training steps.", floor=0.0)
    if alone and any(len(row.get("heads") or []) > 1 for row in alone.steps):
        found.append(Chart(run_plots.heads(alone.steps, f"{identifier}-heads"), "Each head’s mean reward over steps."))
    add("Tokens of a completion", {"tokens": ""}, "Mean length over training steps.", floor=0.0)
    add("Completions that ended", {"ended": ""}, "Share that ended by itself.", floor=-0.03, ceiling=1.03)
    if alone and "alarm_threshold" in alone.settings:
        add("Monitor", {"monitor_score": ""}, "The monitor’s score.", level=float(alone.settings["alarm_threshold"]))
    return found


# ---- completions ----


def _samples(run: PolicyRun) -> Answers | None:
    """The same prompts early and late in training."""
    path = run.folder / "samples.jsonl"
    if not path.exists():
        return None
    first: dict[str, Json] = {}
    last: dict[str, Json] = {}
    for row in _ends(path):
        key = json.dumps(row["prompt"])
        first.setdefault(key, row)
        if key not in last or row["step"] > last[key]["step"]:
            last[key] = row
    apart = sorted(first, key=lambda key: first[key]["step"] - last[key]["step"])
    if not apart:
        return None
    again = [key for key in apart if first[key]["step"] < last[key]["step"]]
    half = NUM_PROMPTS // 2  # of as many prompts as there are steps to fill, none may have come twice
    shown = []
    for key in (again or list(dict.fromkeys([*apart[:half], *apart[-half:]])))[:NUM_PROMPTS]:
        rows = [first[key], last[key]] if last[key]["step"] > first[key]["step"] else [first[key]]
        answers = [
            Answer(f"step {row['step']}", row["completion"], f"reward {signed(row.get('reward'))}") for row in rows
        ]
        shown.append((prompt_line(first[key]["prompt"]), answers))
    alone = "No prompt came twice: one completion of each, of the first and last steps."
    return Answers(shown, "The first completion of a prompt in each of the two steps." if again else alone)


def prompt_line(prompt: Any) -> str:
    """A prompt for a heading: its last user turn."""
    if isinstance(prompt, str):
        return prompt
    return str(next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1]["content"]))


def _ends(path: Path) -> list[Json]:
    """The rows at both ends of a JSON-lines file; all of a small one."""
    size = path.stat().st_size
    if size <= 2 * _READ_AT_EACH_END:
        return list(read_rows(path))
    with path.open("rb") as file:
        head = file.read(_READ_AT_EACH_END).splitlines()[:-1]
        file.seek(size - _READ_AT_EACH_END)
        tail = file.read().splitlines(keepends=True)[1:]
    return [json.loads(line) for line in (*head, *(line for line in tail if line.endswith(b"\n")))]
