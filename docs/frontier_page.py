"""The gold–KL frontier, from the newest results/frontier-DATE.json alone: `python docs/frontier_page.py`.

It draws docs/images/frontier.svg, and writes the passages of the README and the documentation that stand between
`<!-- frontier NAME -->` and `<!-- end -->`. Arms and seeds that are not in the file are left out. The verdict is that
of experiments/frontier_design.md: yes or no where p after Holm is below .05, else open.
"""

import hashlib
import html
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poise.functional.statistics import holm, mean_between
from poise.reports.plot_style import GRAY, STYLES, Style, look, svg

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PASSAGE = re.compile(r"(<!-- frontier ([\w ]+) -->)(\s*).*?(\s*)(<!-- end -->)", re.DOTALL)
DESIGNED = 12  # seeds
DESIGNED_ARMS = 7  # beside one head
FEWEST = 3  # seeds from which on an arm is drawn
TEXTS = 4  # that the page shows of every arm; the others are in the raw data
FIRST, SETTLED = "single", "bound_settled"
BAND = (5, 30)  # KL of the endpoint
LEAST = 10.0  # the KL below which a run stands apart
WIDTH = 2.5  # a curve at a KL is the mean over this much KL on either side
ARMS: dict[str, tuple[str, Style]] = {
    "single": ("one head", STYLES[1]),
    "brme": ("BRME, λ = .4", STYLES[3]),
    "typical": ("typicality", STYLES[2]),
    "two_depths": ("worst of two depths", STYLES[4]),
    "single_settled": ("one head, settled", STYLES[5]),
    "bound_settled": ("lower bound, settled", STYLES[0]),
    "brme_lora": ("BRME, an adapter a head", Style(STYLES[3].color, "-", "X")),
    "uwo": ("UWO, four trunks", Style(STYLES[4].color, "--", "*")),
}
PROXY, G1 = STYLES[1], Style(GRAY, ":", "D")

Json = dict[str, Any]


def newest() -> Path:
    return max((ROOT / "results").glob("frontier-*.json"))


# ---- the picture ----


def gains(run: Json, name: str) -> np.ndarray:
    """A run's reward or gold since its start, in stds of the initial policy's completions."""
    values = np.array(run[name])
    return (values - values[0]) / run["std_at_start"].get(name, 1.0)  # the reward's own unit is that std


def by_kl(run: Json, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(KL, gain): at each KL that the run reaches, the mean over the KL within WIDTH of it; 0 at the start."""
    kl = np.array(run["kl"])
    grid = np.arange(0.5, kl.max(), 0.5)
    gain = gains(run, name)
    means = [
        mean_between(kl, gain, at - min(at, WIDTH), min(kl.max(), at + min(at, WIDTH)))  # narrower where it starts
        for at in grid
    ]
    return np.concatenate([[0.0], grid]), np.concatenate([[0.0], means])


def draw(axes: Axes, runs: list[Json], name: str, style: Style, label: str, thin: float = 0.3) -> None:
    """Each seed thin, and the mean of those that pass LEAST, as far as all of them go: its seeds never change."""
    curves = [by_kl(run, name) for run in runs]
    longest = max((grid for grid, _ in curves), key=len)
    values = np.full((len(runs), len(longest)), np.nan)
    for row, (_, curve) in enumerate(curves):
        values[row, : len(curve)] = curve
    if thin:
        axes.plot(longest, values.T, color=style.color, alpha=thin, linewidth=0.7)
    long = values[[max(run["kl"]) > LEAST for run in runs]]
    reached = np.isfinite(long).all(0) & (len(long) > 0)
    axes.plot(longest[reached], long[:, reached].mean(0), style.dash, color=style.color, linewidth=2, label=label)


def runs_of(found: Json, arm: str) -> list[Json]:
    return [runs[arm] for runs in found["curves"].values() if arm in runs]


def picture(found: Json) -> Figure:
    """Reward and gold of one head and of the bounded arm over KL; gold of all arms; their differences from one head."""
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    (one, bounded), (all_arms, differences) = figure.subplots(2, 2)
    bounded.sharey(one)
    for axes, arm, title in (
        (one, FIRST, "One head"),
        (bounded, SETTLED, "Lower bound, settling at +2"),
    ):
        runs = runs_of(found, arm)
        axes.set(title=f"{title} ({counted(len(runs))})", xlabel="KL to the initial policy, nats", xlim=(0, 41))
        if not runs:
            axes.text(0.5, 0.5, "no run yet", transform=axes.transAxes, ha="center", color=GRAY)
            continue
        draw(axes, runs, "reward", PROXY, "the reward it is given (proxy)")
        draw(axes, runs, "g2", STYLES[0], "gold G2, a reward model of all layers")
        draw(axes, runs, "g1", G1, "gold G1, a lexicon", thin=0)
        axes.legend(fontsize=8)
    one.set_ylabel("gain since the start, stds")
    for arm, (label, style) in ARMS.items():
        if len(runs := runs_of(found, arm)) >= FEWEST:
            draw(all_arms, runs, "g2", style, f"{label} ({len(runs)})", thin=0.15)
    all_arms.axvspan(*BAND, color=GRAY, alpha=0.08, linewidth=0)
    all_arms.set(
        title="Gold (G2) of every arm", xlabel="KL to the initial policy, nats", xlim=(0, 41), ylabel="gain, stds"
    )
    all_arms.legend(fontsize=8)
    forest(differences, found)
    return figure


def forest(axes: Axes, found: Json) -> None:
    """Every arm's gold at equal KL minus that of one head, by both golds, with Student's intervals."""
    arms = [arm for arm in tested(found) if found["arms"][arm][f"g2, minus {FIRST}"]["seeds"] >= FEWEST]
    for row, arm in enumerate(arms):
        for shift, gold, style, label in ((-0.12, "g2", STYLES[0], "G2"), (0.12, "g1", G1, "G1")):
            of = found["arms"][arm][f"{gold}, minus {FIRST}"]
            axes.plot(of["interval"], [row + shift] * 2, color=style.color, linewidth=1.6)
            axes.plot(of["difference"], row + shift, style.marker, color=style.color, label=label if not row else None)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set(
        title="Minus one head, at equal KL (5 to 30)", xlabel="difference in gold, stds; 95 % intervals",
        yticks=range(len(arms)), yticklabels=[ARMS[arm][0] for arm in arms], ylim=(len(arms) - 0.4, -0.6),
    )  # fmt: skip
    if arms:
        axes.legend(fontsize=8)


def counted(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds != 1)}"


def tested(found: Json) -> list[str]:
    return [arm for arm in ARMS if f"g2, minus {FIRST}" in found["arms"].get(arm, {})]


def drawn(found: Json) -> str:
    """The SVG file, on white: forges show it in dark mode too. A comment says of which result it is."""
    with look("frontier"):
        figure = picture(found)
        figure.set_facecolor("white")
        return f"{svg(figure, 'frontier')}\n<!-- of curves and arms {digest(found)} -->\n"


def digest(found: Json) -> str:
    return hashlib.sha256(json.dumps([found["curves"], found["arms"]], sort_keys=True).encode()).hexdigest()[:16]


# ---- the passages ----


def number(value: float, sign: bool = True) -> str:
    """Two digits without a leading zero: +.79, −1.20."""
    text = f"{value:{'+' if sign else ''}.2f}"
    return re.sub(r"(?<!\d)0\.", ".", text).replace("-", "−")


def difference(of: Json | None) -> str:
    """A difference with its interval: +.79 (−.97 to +2.55)."""
    if of is None:
        return ""
    if "interval" not in of:
        return f"{number(of['difference'])} (one seed)"
    return f"{number(of['difference'])} ({number(of['interval'][0])} to {number(of['interval'][1])})"


def gap(found: Json, arm: str, gold: str = "g2", tail: str = "") -> Json | None:
    return found["arms"][arm].get(f"{gold}, minus {FIRST}{tail}")


def verdict(found: Json, arm: str) -> str:
    of = gap(found, arm) or {}
    if of.get("p after Holm", 1.0) >= 0.05:
        return "open"
    return "yes" if of["difference"] > 0 else "no"


def unfinished(found: Json) -> bool:
    """Does an arm lack seeds of the design?"""
    return min(len(one["seeds"]) for one in found["arms"].values()) < DESIGNED


def of_design(found: Json) -> str:
    """How far the design is filled: `3 of 12 seeds`."""
    counts = {len(one["seeds"]) for one in found["arms"].values()}
    return f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} of {DESIGNED} seeds"


def in_words(found: Json) -> str:
    """The verdict of every arm, best first: `yes for …; open for …`."""
    parts = []
    for word in ("yes", "no", "open"):
        if arms := [arm for arm in tested(found) if verdict(found, arm) == word]:
            parts.append(f"{word} for " + ", ".join(f"{ARMS[arm][0]} {difference(gap(found, arm))}" for arm in arms))
    return "; ".join(parts) or "no arm stands beside one head yet"


def from_to(kl: list[float]) -> str:
    """The range of whole nats: 32–35, or 35."""
    return "–".join(dict.fromkeys((f"{min(kl):.0f}", f"{max(kl):.0f}")))


def way(found: Json, arm: str) -> str:
    """How far an arm's runs go, and where their reward and gold end."""
    reward = np.mean([gains(run, "reward")[-3:].mean() for run in runs_of(found, arm)])
    at, kl = found["arms"][arm]["gold at stops"], found["arms"][arm]["largest KL"]
    return (
        f"({counted(len(kl))}, to KL {from_to(kl)}) the reward ends {number(reward)} stds above the start "
        f"and gold {number(at['end'])}, after {number(at['best step'])} at its best step"
    )


def caption(found: Json) -> str:
    settled = (
        f"With a lower bound that settles at a ceiling {way(found, SETTLED)}. " if SETTLED in found["arms"] else ""
    )
    return (
        "*PPO of SmolLM2-135M against reward models of 8 layers. Gold (G2) is a reward model of all 30 that labeled "
        f"the pairs, a quarter of them flipped. Thin lines are seeds, thick ones their mean as far as all of "
        f"them go. Top: with one head {way(found, FIRST)}. {settled}"
        f"Bottom: gold of every arm that has {FEWEST} seeds, and its difference from one head at equal KL. {CAUTION}*"
    )


def short_caption(found: Json) -> str:
    """What the README says under the picture."""
    first, bounded = (found["arms"].get(arm, {}).get("gold at stops") for arm in (FIRST, SETTLED))
    settled = (
        f" A bounded reward that settles ends at {number(bounded['end'])}, after {number(bounded['best step'])}."
        if bounded else ""
    )  # fmt: skip
    return (
        "*Top: PPO of SmolLM2-135M against one head. The reward rises; gold, a larger reward model that labeled the "
        f"pairs, ends {number(first['end'])} stds above the start, after {number(first['best step'])} at its best step."
        f"{settled} Bottom: gold of all arms, and what they have more than one head at equal KL, with 95 % intervals. "
        f"{of_design(found)}, thin lines.*"
    )


def finding(found: Json) -> str:
    """The README's first line of findings: the arm with the largest difference, or those that are told from zero."""
    better = [arm for arm in tested(found) if verdict(found, arm) == "yes"]
    several = [arm for arm in tested(found) if "interval" in (gap(found, arm) or {})]
    if not several:
        return "**At equal KL no reward stands beside one head yet**"
    arms = better or [max(several, key=lambda arm: abs(found["arms"][arm][f"g2, minus {FIRST}"]["difference"]))]
    said = " and ".join(
        f"{ARMS[arm][0]} {difference(gap(found, arm))}, by the lexicon {difference(gap(found, arm, 'g1'))}"
        for arm in arms
    )
    if better:
        looks = "provisional, " if unfinished(found) else ""
        return f"**At equal KL more gold than one head**: {said}; {looks}{of_design(found)}"
    return f"**At equal KL no reward is told from one head** yet; the largest difference: {said}, {of_design(found)}"


def paper(found: Json) -> str:
    """Does the paper's trade-off keep its gold?"""
    of = found["arms"]["brme"]
    lost = of["gold at stops"]["lost against the best step"]["end"]
    claim = "does not keep" if lost.get("interval", [0.0, 0.0])[1] < 0 else "is not seen to keep"
    return (
        f"**The paper's trade-off {claim} its gold**: BRME, λ = .4, ends {difference(lost)} from its best step, at KL "
        f"{from_to(of['largest KL'])}, {counted(len(of['seeds']))}"
    )


def stopping(found: Json) -> str:
    """What a bounded reward that settles has at its end, and against one head that stops at KL 20."""
    of = found["arms"][SETTLED]
    end, stopped = (of[f"g2 at its end, minus {FIRST} at {stop}"] for stop in ("end", "KL 20"))
    return (
        f"**Stopping in time**: bounded and settling, a policy ends at KL {from_to(of['largest KL'])} with "
        f"{difference(end)} more gold than one head's end, and {difference(stopped)} more than one head stopped at "
        f"KL 20, {counted(len(of['seeds']))}"
    )


def answer(found: Json) -> str:
    words = [verdict(found, arm) for arm in tested(found)]
    word = "Yes" if "yes" in words else "Open" if "open" in words or not words else "No"
    looks = "provisional, " if unfinished(found) else ""
    return f"**{word}**, {looks}{of_design(found)}: {in_words(found)}"


def page_verdict(found: Json) -> str:
    same, of = found["arms on which G1 and G2 have the same sign"]
    interim = (
        f" This is {of_design(found)}, and was looked at before: until all are there a yes or a no is provisional."
    )
    return (
        f"**Verdict.** More gold (G2) than one head at equal KL, in stds of the initial completions: {in_words(found)}."
        f"{interim * unfinished(found)}{with_all_arms(found)} {CAUTION} The two golds have the same sign on {same} of "
        f"{of} arms, and over a run's steps a rank correlation of {number(found[CORRELATION], sign=False)}."
    )


def with_all_arms(found: Json) -> str:
    """What the p-values of a yes would be if the arms of the design that have no run had the largest ones."""
    yes = [arm for arm in tested(found) if verdict(found, arm) == "yes"]
    left = DESIGNED_ARMS - len(tested(found))
    if not yes or left <= 0:
        return ""
    known = [found["arms"][arm][f"g2, minus {FIRST}"].get("p", 1.0) for arm in tested(found)]
    p_values = dict(zip(tested(found), holm([*known, *[1.0] * left]), strict=False))
    most = max(p_values[arm] for arm in yes)
    return (
        f" {left} of the {DESIGNED_ARMS} arms of the design have not been run: with the largest p-values, they would "
        f"raise that of a yes to {number(most, sign=False)} at most."
    )


def summary(found: Json) -> str:
    """What stopping.md says."""
    first = found["arms"][FIRST]["gold at stops"]
    lost = first["lost against the best step"]
    stops = ", ".join(f"{name} {number(lost[name]['difference'])}" for name in STOPS if name in lost)
    return (
        f"**At equal KL**, {of_design(found)}: gold (G2) minus that of one head is {in_words(found)}. With one head "
        f"{way(found, FIRST)}. What stops that read no gold lose of one head's best step: {stops}. {CAUTION}"
    )


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def differences_table(found: Json) -> str:
    columns = ("arm", "seeds", "ends at KL", "G2, minus one head", "p, Holm", "later seeds", "G1", "more?")
    rows = [row(list(columns)), row(["---"] * len(columns))]
    for arm in (arm for arm in ARMS if arm in found["arms"]):
        kl = found["arms"][arm]["largest KL"]
        rest = ["", "", "", "", ""]
        if arm in tested(found):
            p = (gap(found, arm) or {}).get("p after Holm")
            rest = [
                difference(gap(found, arm)), "" if p is None else "< .01" if p < 0.005 else number(p, sign=False),
                difference(gap(found, arm, tail=", later seeds")), difference(gap(found, arm, "g1")),
                verdict(found, arm),
            ]  # fmt: skip
        rows.append(row([ARMS[arm][0], str(len(kl)), from_to(kl), *rest]))
    return "\n".join(rows)


def stops_table(found: Json) -> str:
    arms = {arm: found["arms"][arm]["gold at stops"] for arm in ARMS if arm in found["arms"]}
    rows = [header(found, "stop"), row(["---"] * (1 + len(arms)))]
    rows.append(row(["**best step**: gold", *(number(of["best step"]) for of in arms.values())]))
    for name in STOPS:
        lost = (of["lost against the best step"][name] for of in arms.values())
        rows.append(row([f"{name}: minus best step", *map(difference, lost)]))
    return "\n".join(rows)


def rungs_table(found: Json) -> str:
    arms = [found["arms"][arm]["gold at rungs"] for arm in ARMS if arm in found["arms"]]
    rows = [header(found, "KL"), row(["---"] * (1 + len(arms)))]
    for rung in (rung for rung in ("5", "10", "20", "40") if any(rung in of["g2"] for of in arms)):
        cells = [
            f"{number(of['g2'][rung]['gold'])}, {number(of['g1'][rung]['gold'])} ({of['g2'][rung]['seeds']})"
            if rung in of["g2"] else "" for of in arms
        ]  # fmt: skip
        rows.append(row([rung, *cells]))
    return "\n".join(rows)


def written_table(found: Json) -> str:
    """What the policies write at their end."""
    columns = (
        "arm",
        "distinct word pairs",
        "whole sentences",
        "on the subject",
        f"the first prompt's answer, first {TEXTS} seeds",
    )
    rows = [row(list(columns)), row(["---"] * len(columns))]
    for arm in (arm for arm in ARMS if arm in found["arms"] and found["arms"][arm].get("written")):
        shares = [number(share, sign=False) for share in found["arms"][arm]["written"].values()]
        texts = [run["written"]["first"] for run in runs_of(found, arm) if "written" in run][:TEXTS]
        rows.append(
            row(
                [
                    ARMS[arm][0],
                    *shares,
                    "<br>".join(html.escape(text, quote=False).replace("|", "&#124;") for text in texts),
                ]
            )
        )
    return "\n".join(rows)


def header(found: Json, first: str) -> str:
    return row([first, *(ARMS[arm][0] for arm in ARMS if arm in found["arms"])])


def choice(found: Json) -> str:
    """What `poise choose` would have taken on the frontier's curves."""
    of = found["poise choose"]
    below, start, fit, wins = (f"{100 * of['share within'][name]:.0f} %" for name in RULES)
    lost = [number(of["mean gold lost"][name], sign=False) for name in RULES]
    return (
        f"On the {len(of['runs'])} curves of the frontier, which had no part in that choice, {below} are as close "
        f"(beside the start {start}, with a free fit {fit}, by the most wins {wins}), and the rung taken loses "
        f"{lost[0]} stds of gold on average (the others {lost[1]}, {lost[2]} and {lost[3]})"
    )


RULES = ("below", "start", "free unimodal fit", "most wins")


def alarms_table(found: Json) -> str:
    """How many falls of gold each alarm finds, and how often it is false, by seeds and by how far gold must fall."""
    falls = list(next(iter(found["alarms"].values())))
    rows = [row(["", "alarm", *(f"gold falls by {fall}" for fall in falls), "gold there, minus best step"])]
    rows.append(row(["---"] * (3 + len(falls))))
    for seeds, by_fall in found["alarms"].items():
        for name in (key for key in by_fall[falls[0]] if key != "falls"):
            of = [by_fall[fall][name] for fall in falls]
            cells = ["{} of {}, false {} of {}".format(*one["found"], *one["false alarms"]) for one in of]
            rows.append(row([seeds, name, *cells, difference(of[0]["gold there, minus best step"])]))
    return "\n".join(rows)


def alarm(found: Json) -> str:
    def said(of: Json, name: str) -> str:
        return "{} of {} falls of gold by half a std, with {} false in {} runs".format(
            *of["0.5"][name]["found"], *of["0.5"][name]["false alarms"]
        )

    parts = []
    for seeds, of in found["alarms"].items():
        deeper = next(name for name in of["0.5"] if name.startswith("validator"))
        parts.append(f"on the {seeds} it finds {said(of, deeper)} (the monitor alone {said(of, 'the monitor alone')})")
    return "With the 16-layer validator of the frontier, " + "; ".join(parts)


def monitor(found: Json) -> str:
    """The monitor's own alarm on all runs of the frontier, none of which had a part in its limits."""
    parts = []
    for fall in ("0.5", "0.25"):
        of = [by_fall[fall]["the monitor alone"] for by_fall in found["alarms"].values()]
        rang, falls = (sum(one["found"][i] for one in of) for i in (0, 1))
        false, others = (sum(one["false alarms"][i] for one in of) for i in (0, 1))
        parts.append(
            f"{falls} fell by {fall} stds from the best step: an alarm in {rang}, and in {false} of the other {others}"
        )
    return f"{len(found['poise choose']['runs'])} runs of the frontier | " + "; ".join(parts)


def best(found: Json) -> str:
    """What the policy that a run keeps has beside other stops: means over the arms of a seed, over seeds."""
    of = found["kept as best"]
    return (
        f"On the frontier's {of['runs']} runs, with a validator of 16 layers and held-back pairs, its gold is "
        f"{difference(of['minus best step'])} stds beside that of the best step in hindsight, "
        f"{difference(of['minus KL 20'])} beside that where KL first passes 20, and {difference(of['minus end'])} "
        f"beside the run's end; the mean over two steps was chosen on 25 of these runs"
    )


CORRELATION = "rank correlation of G1 and G2 over a run's steps"
STOPS = (
    "KL 20", "KL 10", "what a run keeps as best, deeper validator",
    "largest gain of the deeper validator", "largest gain of the other pairs' validator",
    "alarm of the deeper validator", "first alarm", "end",
)  # fmt: skip
CAUTION = (
    "G2 learned that shuffled, repeated and cut texts are bad, and the distance that typicality subtracts is large for "
    "just such texts; the lexicon (G1) is the check on that."
)
PASSAGES: dict[str, Callable[[Json], str]] = {
    "caption": caption, "short caption": short_caption, "finding": finding, "answer": answer,
    "paper": paper, "stopping": stopping,
    "verdict": page_verdict, "summary": summary,
    "differences": differences_table, "stops": stops_table, "rungs": rungs_table, "written": written_table,
    "choice": choice, "alarms": alarms_table, "alarm": alarm, "best": best,
    "monitor": monitor,
    "sources": lambda _: f"Raw data: [{newest().stem}](../../results/{newest().name}), every step of every run.",
}  # fmt: skip


def with_passages(text: str, found: Json) -> str:
    """A page with its passages written anew; prose is wrapped where the passage stands on lines of its own."""

    def written(match: re.Match[str]) -> str:
        start, name, before, after, end = match.groups()
        body = PASSAGES[name](found)
        if "\n" in before and not body.startswith("|"):
            body = textwrap.fill(body, 128, break_long_words=False, break_on_hyphens=False)
        return f"{start}{before}{body}{after}{end}"

    return PASSAGE.sub(written, text)


def pages() -> list[Path]:
    every = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [path for path in every if PASSAGE.search(path.read_text(encoding="utf-8"))]


def main() -> None:
    found = json.loads(newest().read_text(encoding="utf-8"))
    (DOCS / "images" / "frontier.svg").write_text(drawn(found), encoding="utf-8")
    for path in pages():
        path.write_text(with_passages(path.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
