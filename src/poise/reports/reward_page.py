"""The page and figure of `poise evaluate-reward`, from the run folder alone.

RUN/evaluation.html    self-contained; what went wrong comes first
RUN/calibration.png    reliability and risk–coverage of the first reward model, for a file of pairs
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from poise.errors import PoiseError
from poise.reports import plots
from poise.reports.plot_style import on_pages
from poise.reports.quickstart_page import (
    Verdict,
    number,
    one_line_if_damaged,
    page_template,
    percent,
    read_json,
    signed,
)
from poise.runtime.run_folder import Json, write_atomic

SPREADS = ("disagreement", "routing_std", "total_std", "last_layer_std")
_ORDER = ("worse", "unclear", "better")
FEW_ERRORS = 10  # pairs in the wrong order (or in the right one): of fewer an AUROC says nothing, whatever its interval


@one_line_if_damaged
def build(folder: str | Path) -> Path:
    """Write RUN/evaluation.html (and, for pairs, RUN/calibration.png) and return the page's path."""
    folder = Path(folder)
    results = read_json(folder / "results.json")
    if results is None or "rewards" not in results:
        raise PoiseError(f"{folder} is not a finished poise evaluate-reward run")
    environment = read_json(folder / "environment.json") or {}
    paths = [reward["reward"] for reward in results["rewards"]]
    names = _short_names(paths)
    config = folder / "config.yaml"
    page = page_template("reward.html.j2").render(
        results=results,
        verdicts=verdicts(results),
        names=names,
        short=dict(zip(paths, names, strict=True)),
        glossary=GLOSSARY,
        sections=[_section(reward, f"reward{i}") for i, reward in enumerate(results["rewards"], 1)],
        colors={name: on_pages(style.color) for name, style in plots.UNCERTAINTY_STYLES.items()},
        spreads=SPREADS,
        environment=environment,
        command=shlex.join(environment.get("command") or []),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )
    if results["kind"] == "pairs":
        plots.save_calibration(results["rewards"][0]["pairs"], folder / "calibration.png")
    path = folder / "evaluation.html"
    write_atomic(path, page)
    return path


# ---- the answer ----


def verdicts(results: Json) -> list[Verdict]:
    """What to know first, failures before successes. Of several reward models, accuracy and other failures only."""
    rewards = results["rewards"]
    found = []
    for reward in rewards:
        accuracy, *others = findings(reward, "The reward model" if len(rewards) == 1 else reward["reward"])
        if len(rewards) > 1:
            on_other_data = others[2:3]
            failures = [v for v in others if v.kind == "worse" or (v in on_other_data and v.kind == "unclear")]
            others = [Verdict(kind, f"{reward['reward']}: {text}") for kind, text in failures]
        found += [accuracy, *others]
    return sorted(found, key=lambda verdict: _ORDER.index(verdict.kind))


def findings(reward: Json, name: str) -> list[Verdict]:
    """One reward model's results as sentences that claim no more than their intervals; accuracy comes first."""
    if sets := reward.get("sets"):
        return [_of_styles(sets, name) if "matrix" in sets else _of_sets(sets, name)]
    found = [_of_accuracy(reward["pairs"], name), _of_probabilities(reward["pairs"]), _of_errors(reward["pairs"])]
    if ood := reward.get("ood"):
        found += [_of_accuracy(ood, "On the other data it"), _of_other_data(reward["ood_auroc"])]
    return found


def _of_accuracy(pairs: Json, name: str) -> Verdict:
    low, high = pairs["accuracy_interval"]
    text = (
        f"{name} orders {percent(pairs['accuracy'])} of {pairs['num_pairs']} pairs as people did "
        f"({_interval(pairs['accuracy_interval'], percent)}); they chose the longer text in "
        f"{percent(pairs['length_accuracy'])}"
    )
    more_low, more_high = pairs["over_length_interval"]
    if high < 0.5:
        return Verdict("worse", f"{text}: worse than a coin toss.")
    if low <= 0.5:
        return Verdict("unclear", f"{text}: not distinguishable from a coin toss.")
    against = f"{points(pairs['over_length'])} ({_interval(pairs['over_length_interval'], points)})"
    if more_high < 0:
        return Verdict("worse", f"{text}: worse than picking the longer text, {against}.")
    if more_low <= 0:
        return Verdict("unclear", f"{text}: not distinguishable from picking the longer text, {against}.")
    return Verdict("better", f"{text}: {against} better.")


def _of_probabilities(pairs: Json) -> Verdict:
    own, constant, coin = pairs["probability"]["nll"], pairs["constant_nll"], pairs["coin_nll"]
    low, high = pairs["probability"]["nll_interval"]
    text = f"Its probabilities cost {number(own, 3)} nats a pair ({_interval((low, high), lambda v: number(v, 3))})"
    if own is None or low is None or low > coin:
        return Verdict("worse", f"{text}, more than a coin’s {number(coin, 3)}: it is surer than it is right.")
    if own >= constant:
        return Verdict("unclear", f"{text}, no less than the {number(constant, 3)} of one confidence for all pairs.")
    text = f"{text}, those of one confidence for all pairs {number(constant, 3)}"
    if high >= constant:
        return Verdict("unclear", f"{text}, which the interval does not rule out.")
    return Verdict("better", f"{text}.")


def _of_errors(pairs: Json) -> Verdict:
    known = pairs["uncertainties"]
    if all(item["auroc"] is None for item in known.values()):
        return Verdict("unclear", "It makes no mistake, or nothing else: its uncertainties have nothing to tell apart.")
    wrong = round((1 - pairs["accuracy"]) * pairs["num_pairs"])
    if (few := min(wrong, pairs["num_pairs"] - wrong)) < FEW_ERRORS:
        which = "wrongly" if few == wrong else "rightly"
        text = (
            f"It orders only {few} of {pairs['num_pairs']} pairs {which}: too few to say what its uncertainties know."
        )
        return Verdict("unclear", text)
    telling = [name for name in known if name != "random" and _above_half(known[name])]
    listed = ", ".join(f"{name} {number(known[name]['auroc'])}" for name in known if name != "random")
    misleading = [name for name in known if name in SPREADS and _below_half(known[name])]
    if misleading:
        verb = "is" if len(misleading) == 1 else "are"
        text = f"{' and '.join(misleading)} {verb} larger where it is right than where it is wrong (AUROC {listed})."
        return Verdict("worse", text)
    if not telling:
        return Verdict("unclear", f"No uncertainty tells its errors from a coin toss (AUROC {listed or 'of none'}).")
    spreads = [name for name in telling if name in SPREADS]
    if not spreads and any(name in SPREADS for name in known):
        text = f"Only how close it calls a pair tells its errors, none of its spreads does (AUROC {listed})."
        return Verdict("unclear", text)
    return Verdict("better", f"Its errors are told by {', '.join(telling)} (AUROC {listed}).")


def _of_other_data(known: Json) -> Verdict:
    spreads = [name for name in known if name != "random"]
    listed = ", ".join(f"{name} {number(known[name]['auroc'])}" for name in spreads)
    if not spreads:
        return Verdict("unclear", "It has no uncertainty that could notice texts of other data.")
    if misleading := [name for name in spreads if _below_half(known[name])]:
        text = f"Smaller on texts of the other data, as if they were better known: {' and '.join(misleading)}"
        return Verdict("worse", f"{text} (AUROC {listed}).")
    blind = [name for name in spreads if not _above_half(known[name])]
    if len(blind) == len(spreads):
        return Verdict("unclear", f"None of its uncertainties is larger on texts of the other data (AUROC {listed}).")
    but = f"; not by {', '.join(blind)}" if blind else ""
    return Verdict("better", f"It notices texts of the other data{but} (AUROC {listed}).")


def _of_styles(sets: Json, name: str) -> Verdict:
    hard = sets["scores"]["hard"]
    others = ", ".join(f"{percent(sets['scores'][key]['accuracy'])} on {key}" for key in ("normal", "easy"))
    text = (
        f"{name} is right on {percent(hard['accuracy'])} of hard comparisons "
        f"({_interval(hard['interval'], percent)}), in which the wrong answer has the fancier style; {others} ones"
    )
    low, high = hard["interval"]
    if high < 0.5:
        return Verdict("worse", f"{text}: it pays for style more than for being right.")
    return Verdict("better" if low > 0.5 else "unclear", f"{text}.")


def _of_sets(sets: Json, name: str) -> Verdict:
    low, high = sets["over_chance_interval"]
    text = (
        f"{name} finds a chosen text in {percent(sets['accuracy'])} of {sets['num_sets']} sets "
        f"({_interval(sets['accuracy_interval'], percent)}), chance would in {percent(sets['chance'])}, "
        f"the longest text is one in {percent(sets['length_accuracy'])}"
    )
    if high < 0:
        return Verdict("worse", f"{text}: worse than chance.")
    if low <= 0:
        return Verdict("unclear", f"{text}: not distinguishable from chance.")
    if sets["over_length_interval"][0] <= 0:
        return Verdict("unclear", f"{text}: not distinguishable from picking the longest.")
    return Verdict("better", f"{text}.")


def _above_half(known: Json) -> bool:
    """Is the AUROC above a coin toss, its interval too?"""
    return known["auroc"] is not None and known["auroc_interval"][0] > 0.5


def _below_half(known: Json) -> bool:
    return known["auroc"] is not None and known["auroc_interval"][1] < 0.5


def _interval(interval: Sequence[Any], text: Callable[[Any], str]) -> str:
    return f"95\xa0% interval {text(interval[0])} to {text(interval[1])}"


def points(value: Any) -> str:
    """A difference of shares, in percentage points.

    >>> points(-0.125), points(None)
    ('−12.5\xa0points', '–')
    """
    return signed(value) if value is None else f"{signed(100 * value, 1)}\xa0points"


# ---- the page ----

GLOSSARY = {
    "accuracy": "Share of pairs that the model orders as people did; ties count half.",
    "longer text": "The accuracy of always choosing the longer text: what a model must beat to have read anything.",
    "NLL": "Negative log-likelihood of people’s choices under the model’s probabilities, in nats a pair; a coin has "
    "0.693.",
    "Brier": "Mean squared error of the probabilities; a coin has 0.25.",
    "ECE": "Expected calibration error: how far claimed probabilities are from the shares that come true.",
    "AUROC": "How often a wrongly ordered pair has the larger uncertainty than a rightly ordered one; a coin has 0.50.",
    "risk–coverage": "The error rate among the pairs that are kept, if the most uncertain ones are left out first.",
    "disagreement": "Std of the heads’ mean rewards.",
    "routing_std": "Std that the nominal head, the one with the lowest std, gives itself.",
    "total_std": "The heads’ own stds and their disagreement together.",
    "last_layer_std": "Std of the reward over the Laplace posterior of the last layer, without sampling heads.",
    "small_margin": "How close the reward calls a pair: minus the difference of its two rewards.",
}


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(path).parts or (path,) for path in paths]
    longest = max(map(len, parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _section(reward: Json, identifier: str) -> Json:
    """What the template is given of one reward model."""
    pairs, ood = reward.get("pairs"), reward.get("ood")
    learning = reward.get("learning") or {}
    history = learning.get("stage2_history")
    return {
        "reward": reward,
        "findings": findings(reward, "The reward model"),
        "blocks": [
            {"title": title, "pairs": block, "svgs": [*map(Markup, plots.calibration(block, f"{identifier}{key}"))]}
            for title, key, block in (("", "file", pairs), ("Other data", "ood", ood))
            if block
        ],
        "collapsed": learning.get("std_collapsed"),
        "stage2_svg": Markup(plots.stage2(history, f"{identifier}stage2")) if history else None,
    }
