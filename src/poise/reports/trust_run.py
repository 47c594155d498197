"""What the page of a `poise trust` run shows, from its folder alone: three questions, each answered in words."""

from pathlib import Path

import numpy as np

from poise.functional.trust import fewer_than
from poise.models.model_card import judges_warnings
from poise.reports import run_plots
from poise.reports.blocks import Cell, Chart, Charts, Made, Page, Part, Section, Table, Text
from poise.reports.quickstart_page import Verdict, number, percent, read_json, signed
from poise.runtime.run_folder import Json, load_config_file

# What twice the pairs must be able to bring, for room to be worth anything: of the validator's stds, and of accuracy.
MATTERS = {"selection": 0.1, "accuracy": 0.02}


def page(folder: Path) -> Page:
    """The page of a `poise trust` run."""
    title, made = f"trust {folder.resolve().name}", Section("How it was made", [Made.of(folder)])
    results = read_json(folder / "results.json")
    if results is None:
        return Page(title, [], [made], unfinished="Completions are sampled and scored; nothing is measured yet.")
    sections = [
        Section("Room: would more pairs help?", _room(results["room"])),
        Section("Transfer: does another reward model see the gain?", _transfer(results, folder.resolve().name)),
        Section("Labels: does a judge agree on the policy’s own texts?", _labels(results)),
        made,
    ]
    settings = load_config_file(folder / "config.yaml")
    warnings = judges_warnings(str(settings["reward"]), settings.get("validator"))
    warnings += [beyond] if (beyond := beyond_reach(results)) else []
    return Page(title, findings(results), sections, warnings, glossary=("KL", "validator", "transfer", "best-of-n"))


def findings(results: Json) -> list[Verdict]:
    """One sentence for each question that was asked."""
    found = [_said_of_room(results["room"]), _said_of_transfer(results["transfer"]), _said_of_labels(results)]
    return [verdict for verdict in found if verdict]


def beyond_reach(results: Json) -> str:
    """That the KL aimed at lies where the pool says nothing; "" if it does not."""
    if results["kl"] <= results["reach"]:
        return ""
    return (
        f"You mean to train to KL {number(results['kl'], 1)}; the best of {results['per_prompt']} completions lies at "
        f"KL {number(results['reach'], 1)}. Nothing here says what happens beyond it. Watch --validator in training, "
        f"and judge the ladder with `poise choose`."
    )


def _said_of_room(room: Json | None) -> Verdict | None:
    if room is None:
        return None
    what = "selection" if "selection" in room else "accuracy"
    (low, high), gain = room[f"{what}_interval"], room[f"{what}_doubled"]
    unit = "stds of the validator" if what == "selection" else "of held-out accuracy"
    bounds = f"{signed(gain, 3)} {unit}, 95\xa0% interval {signed(low, 3)} to {signed(high, 3)}"
    if room["seen"]:
        return Verdict(
            "unclear",
            f"Room cannot be told: the trunk was trained on these very pairs, so they are no longer new to it "
            f"({bounds} for twice the pairs). Give --preferences pairs that it has not seen.",
        )
    held = room.get("held_out")  # runs of earlier versions have none
    if held and held["interval"][0] <= 0.5:
        ends = " to ".join(percent(end) for end in held["interval"])
        return Verdict(
            "worse",
            f"A head on all of these pairs orders {percent(held['share'])} of {held['pairs']} held-out ones rightly "
            f"(95\xa0% interval {ends}), no better than a coin: first find labels or features that it can learn from "
            f"({bounds} for twice the pairs).",
        )
    if low > 0:
        return Verdict(
            "better",
            f"There is room: twice the pairs bring {bounds}. More labels of this kind help, and so may a reward that "
            f"is careful where labels are few.",
        )
    if high < 0:
        return Verdict("worse", f"More pairs make it worse: twice as many bring {bounds}. Look at the labels.")
    if high < MATTERS[what]:
        return Verdict(
            "worse",
            f"There is no room: twice the pairs bring {bounds}. No uncertainty about heads can help here: look at "
            f"whose labels they are and at what the trunk can tell apart.",
        )
    return Verdict(
        "unclear",
        f"Whether there is room cannot be told: twice the pairs bring {bounds}. More pairs, or prompts, would say.",
    )


def _said_of_transfer(rows: list[Json] | None) -> Verdict | None:
    if rows is None:
        return None
    last = rows[-1]
    if last["transfer"] is None:
        text = f"The reward gains too little by best-of-{last['n']} to say what transfers: try more completions."
        return Verdict("unclear", text)
    if last["transfer_interval"] is None:
        text = (
            f"The prompts are too few to say what transfers of what the reward gains by best-of-{last['n']}: give more."
        )
        return Verdict("unclear", text)
    low, high = last["transfer_interval"]
    bounds = f"{number(last['transfer'])} (95\xa0% interval {number(low)} to {number(high)})"
    said = f"Of each std that the reward gains by best-of-{last['n']}, the validator sees {bounds}."
    if high <= 0:
        return Verdict("worse", f"{said} What the reward prefers is not what the validator prefers.")
    return Verdict("better" if low > 0 else "unclear", said)


def _said_of_labels(results: Json) -> Verdict | None:
    own = (results["labels"] or {}).get("reward")
    if own is None:
        return None
    low, high = own["interval"]
    known = results["validation_accuracy"]
    beside = f"; on the validation pairs of its training it was right on {percent(known)}" if known is not None else ""
    said = (
        f"The reward orders {percent(own['share'])} of {own['pairs']} pairs of the policy’s own completions as the "
        f"judge does (95\xa0% interval {percent(low)} to {percent(high)}){beside}."
    )
    # Earlier versions did not keep how sure that accuracy is: nothing is said of a difference then.
    known_interval = results.get("validation_accuracy_interval")
    if high < 0.5 or (known is not None and known_interval and fewer_than(own, known, tuple(known_interval))):
        less = "a coin" if high < 0.5 else "on its own pairs"
        why = f"That is less than {less}: the labels are not this judge’s, or not of such texts."
        return Verdict("worse", f"{said} {why}")
    return Verdict("better" if low > 0.5 else "unclear", said)


# ---- sections ----


def _room(room: Json | None) -> list[Part]:
    if room is None:
        return [Text("Not asked: --preferences names the pairs.", "note")]
    head = [
        "Pairs",
        "Held-out accuracy",
        *(["Gain by best-of-n, as the validator sees it"] if "selection" in room else []),
    ]
    rows: list[list[Cell]] = []
    for i, count in enumerate(room["num_pairs"]):
        row: list[Cell] = [number(count, 0), percent(room["accuracy"][i])]
        rows.append(row + ([f"{number(room['selection'][i])} std"] if "selection" in room else []))
    text = (
        "A head fitted anew on the same trunk to a quarter, a half and all of the pairs outside one tenth, which "
        "judges it; each tenth in turn, whole prompts at a time."
    )
    return [Table("Room", head, rows, text)]


def _transfer(results: Json, name: str) -> list[Part]:
    rows = results["transfer"]
    if rows is None:
        return [Text("Not asked: --validator names another reward model.", "note")]
    root = np.sqrt([row["kl"] for row in rows])
    bounds = np.array([row["validator_interval"] for row in rows], dtype=float)
    lines = [
        run_plots.Line("reward", root, np.array([row["proxy"] for row in rows]), 0),
        run_plots.Line("validator", root, np.array([row["validator"] for row in rows]), 1, bounds[:, 0], bounds[:, 1]),
    ]
    svg = run_plots.panel(lines, "Gain by best-of-n, in stds", f"{name}-transfer", xlabel="√KL")
    table_rows: list[list[Cell]] = [
        [
            str(row["n"]), number(row["kl"], 1), signed(row["proxy"]), signed(row["validator"]),
            number(row["transfer"]),
        ]
        for row in rows
    ]  # fmt: skip
    return [
        Charts([Chart(svg, "What the reward and the validator gain by best-of-n, over the root of KL.")]),
        Table("Transfer", ["n", "KL", "Reward gains", "Validator gains", "Transfer"], table_rows),
    ]


def _labels(results: Json) -> list[Part]:
    labels = results["labels"]
    if labels is None:
        return [
            Text(
                "Not judged yet: judge comparisons.jsonl into judgments.jsonl, or start the same command with --page.",
                "note",
            )
        ]
    rows: list[list[Cell]] = [
        [name, str(found["pairs"]), (percent(found["share"]), "{} to {}".format(*map(percent, found["interval"])))]
        for name in ("reward", "validator")
        if (found := labels.get(name))
    ]
    return [Table("Labels", ["Judge’s agreement with", "Pairs", "Share"], rows, f"Ties left out: {labels['ties']}.")]
