"""What the pages of `poise compare` and `poise best-of-n` runs show, from their folders alone."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from poise.reports import run_plots
from poise.reports.blocks import Answer, Answers, Cell, Chart, Charts, Made, Page, Part, Section, Table, Text
from poise.reports.plot_style import column_of
from poise.reports.policy_run import prompt_line
from poise.reports.quickstart_page import Verdict, number, read_json, signed, verdict
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json

NUM_PROMPTS = 12
NO_GOLD = (
    "No gold was given, so nothing here says which texts are better: a higher reward is what was optimized. Read the "
    "texts, or give --gold a reward model that was trained on other data."
)


# ---- compare ----


def comparison(folder: Path) -> Page:
    """The page of a `poise compare` run."""
    title, made = f"comparison {folder.resolve().name}", Section("How it was made", [Made.of(folder)])
    results = read_json(folder / "results.json")
    if results is None:
        return Page(title, [], [made], unfinished="This comparison is not finished.")
    arms = results["arms"]
    with_gold = arms[0]["final"].get("gold") is not None
    findings = [verdict(difference, results) for difference in results.get("differences") or []]
    if not with_gold:
        findings = [Verdict("unclear", NO_GOLD)]
    shown = [
        (row["prompt"], [_answer(name, answer) for name, answer in row["arms"].items()])
        for row in islice(results.get("completions") or [], NUM_PROMPTS)
    ]
    order = (
        "the first arm’s reward most over-scored its own text" if with_gold else "the first arm’s reward was highest"
    )
    sections = [
        Section("Arms", [_arms(arms, results.get("initial") or {}, with_gold), _of_arms(with_gold)]),
        Section("Over training", [Charts(_training(arms, with_gold, folder.resolve().name))]),
        Section("What the policies wrote", [Answers(shown, f"Prompts on which {order} come first.")]),
        made,
    ]
    return Page(title, findings, sections, glossary=("proxy", "KL", "gold", "disagreement"))


def _answer(name: str, answer: Json) -> Answer:
    gold = answer.get("gold")
    said = f" · gold {signed(gold)}" if gold is not None else ""
    return Answer(name, answer["completion"], f"reward {signed(answer.get('proxy'))}{said}")


def _arms(arms: Sequence[Json], initial: Json, with_gold: bool) -> Table:
    head = ["Arm", "Objective", "Reward model", "β", "Reward", "KL", "Distinct pairs", "Alarms"]
    if with_gold:
        head[4:4] = ["Initial gold", "Peak gold", "Final gold"]
    rows: list[list[Cell]] = []
    for arm in arms:
        final = arm["final"]
        row: list[Cell] = [
            arm["label"], arm["objective"], arm["reward"], str(arm["kl_coef"]), signed(final["proxy"]),
            number(final["kl"], 1), number(final.get("distinct_bigrams")), str(len(arm.get("alarms") or [])),
        ]  # fmt: skip
        if with_gold:
            low, high = final.get("interval") or (None, None)
            gold = (signed(final["gold"]), f"{signed(low)} to {signed(high)}")
            row[4:4] = [signed(arm.get("initial_gold")), signed(arm.get("peak_gold")), gold]
        rows.append(row)
    variety = initial.get("distinct_bigrams")
    caption = f"Distinct pairs of the initial policy: {number(variety)}." if variety is not None else ""
    return Table("Arms", head, rows, caption)


def _of_arms(with_gold: bool) -> Text:
    text = (
        "Distinct pairs: distinct word pairs as a share of all, which falls when a policy writes the same about "
        "everything. Rewards of different arms have different units."
    )
    return Text(f"{text} Gold with its 95\xa0% interval over prompts." if with_gold else text, "note")


def _training(arms: Sequence[Json], with_gold: bool, identifier: str) -> list[Chart]:
    keys = {"proxy": "Reward", "kl": "KL to the initial policy", "disagreement": "Disagreement of the heads"}
    if with_gold:
        keys = {"gold": "Gold", **keys}
    found = []
    for key, title in keys.items():
        lines = [run_plots.over_steps(arm["steps"], key, arm["name"], i) for i, arm in enumerate(arms)]
        lines = [line for line in lines if not np.isnan(line.y).all()]
        if lines:
            svg = run_plots.panel(lines, title, f"{identifier}-{key}")
            found.append(Chart(svg, f"{title} of every arm over training steps."))
    return found


# ---- best-of-n ----


def best_of_n(folder: Path) -> Page:
    """The page of a `poise best-of-n` run."""
    title, made = f"best-of-n {folder.resolve().name}", Section("How it was made", [Made.of(folder)])
    results = read_json(folder / "results.json")
    if results is None:
        return Page(title, [], [made], unfinished="This best-of-n is not finished.")
    curves, with_gold = results["curves"], results.get("initial_gold") is not None
    findings = [_of_curve(curve) for curve in curves] if with_gold else [Verdict("unclear", NO_GOLD)]
    parts: list[Part] = [
        _curves(curves, with_gold),
        Charts(
            _selection(curves, with_gold, folder.resolve().name),
            f"Best of n of {results['per_prompt']} completions of each of {results['num_prompts']} prompts, by reward; "
            f"n grows to the right. Bands are 95\xa0% intervals over prompts.",
        ),
    ]
    sections = [Section("What each objective selects", parts), *_selected(folder), made]
    return Page(title, findings, sections, glossary=("best-of-n", "reward", "KL", "gold"))


def _of_curve(curve: Json) -> Verdict:
    first, last = curve["best_of_n"][0], curve["best_of_n"][-1]
    text = (
        f"{curve['label']}: best of {last['n']} has gold {signed(last['gold'])} ({signed(last['gold_low'])} to "
        f"{signed(last['gold_high'])}), one completion {signed(first['gold'])}."
    )
    low, high = ((curve.get("measures") or {}).get("gain") or {}).get("interval") or (None, None)
    if low is None or high is None or low <= 0 <= high:
        return Verdict("unclear", f"{text} The gain is not distinguishable from zero.")
    return Verdict("better" if low > 0 else "worse", text)


def _curves(curves: Sequence[Json], with_gold: bool) -> Table:
    head = ["Objective", "n", "Reward", *(["Gold, n = 1", "Gold", "Peak", "Fall from the peak"] if with_gold else [])]
    rows: list[list[Cell]] = []
    for curve in curves:
        first, last = curve["best_of_n"][0], curve["best_of_n"][-1]
        row: list[Cell] = [curve["label"], str(last["n"]), signed(last["proxy"])]
        if with_gold:
            measures = curve["measures"]
            gold = (signed(last["gold"]), f"{signed(last['gold_low'])} to {signed(last['gold_high'])}")
            row += [signed(first["gold"]), gold, signed(measures["peak_gold"]["mean"])]
            row.append(number(measures["drawdown"]["mean"]))
        rows.append(row)
    return Table("What each objective selects", head, rows)


def _selection(curves: Sequence[Json], with_gold: bool, identifier: str) -> list[Chart]:
    found = []
    for key, title in ((("gold", "Gold"),) if with_gold else ()) + (("proxy", "Reward"),):
        lines = []
        for i, curve in enumerate(curves):
            points = curve["best_of_n"]
            x, y = column_of(points, "n"), column_of(points, key)
            lines.append(
                run_plots.Line(
                    curve["label"], x, y, i, column_of(points, f"{key}_low"), column_of(points, f"{key}_high")
                )
            )
        svg = run_plots.panel(lines, f"{title} of the best of n", f"{identifier}-{key}", xlabel="n")
        found.append(Chart(svg, f"{title} of the best of n for every objective."))
    return found


def _selected(folder: Path) -> list[Section]:
    path = folder / "selected.jsonl"
    if not path.exists():
        return []
    prompts: dict[str, list[Answer]] = {}
    for row in read_rows(path):
        answers = prompts.setdefault(prompt_line(row["prompt"]), [])
        after = f"reward {signed(row['reward'])}; runner-up {signed(row['runner_up_reward'])}: {row['runner_up']}"
        answers.append(Answer(row["objective"], row["best"], after))
    shown = list(islice(prompts.items(), NUM_PROMPTS))
    note = f"The first {len(shown)} of {len(prompts)} prompts; all are in selected.jsonl."
    return [Section("Selected completions", [Answers(shown, note)])]
