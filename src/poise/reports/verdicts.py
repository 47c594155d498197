"""What a study's numbers come to, in sentences, failures first: arms, benchmarks, published figures.

Pure: a study's results in, verdicts out. A sentence claims no more than its interval, and of a single seed nothing.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from poise.reports.published import as_read_today
from poise.reports.quickstart_page import Verdict, signed
from poise.reports.summary import noise_label
from poise.runtime.run_folder import Json

NUM_NAMED = 6  # differences or claims that one sentence names
ENOUGH_SEEDS = 5
Kind = Literal["worse", "unclear", "better"]
_ORDER: tuple[Kind, ...] = ("worse", "unclear", "better")


class Difference(NamedTuple):
    """Final gold of one arm minus that of the first, under one label noise, over seeds."""

    noise: str
    arm: str
    gold: float
    interval: tuple[float, float] | None
    kind: Kind

    @property
    def text(self) -> str:
        """Where, and unless it may be zero how much, with its interval."""
        if self.interval is None or self.kind == "unclear":  # the interval is in the tables: it holds zero
            return noise_label(self.noise)
        smallest, digits = min(abs(value) for value in (self.gold, *self.interval)), 2
        while smallest < 0.5 / 10**digits and digits < 6:  # no "+0.00" that is said not to be zero
            digits += 1
        low, high = (signed(bound, digits) for bound in self.interval)
        return f"{signed(self.gold, digits)} with {noise_label(self.noise)} ({low} to {high})"


def headlines(results: Json) -> list[Verdict]:
    """What the differences come to: trained policies first, then best-of-n."""
    found = [_counted(*compared) for compared in compared_arms(results) if compared.differences]
    return found or [Verdict("unclear", "There is nothing to compare: no arm has a difference.")]


def findings(results: Json) -> list[Verdict]:
    """What is behind them, failures before successes."""
    found = [finding for compared in compared_arms(results) for finding in _named(*compared)]
    found += [*_of_benchmarks(results), *_of_published(results)]
    return sorted(found, key=lambda verdict: _ORDER.index(verdict.kind))


class Compared(NamedTuple):
    """Differences of one kind of policy, and the arm that they are taken from."""

    what: str
    first: str
    differences: list[Difference]


def compared_arms(results: Json) -> list[Compared]:
    """Of the study's own arms; best-of-n tries all there are, and the rest are in its table."""
    own = (results.get("settings") or {}).get("arms") or []
    trained, pools = results.get("summary") or {}, results.get("best_of_n") or {}
    selected = {noise: _measures(arms) for noise, arms in pools.items()}
    firsts = (own[:1], [name for arms in pools.values() for name in arms][:1])
    found = []
    for what, summary, first in zip(("After PPO", "At best-of-n"), (trained, selected), firsts, strict=True):
        differences = [one for one in _differences(summary) if not own or one.arm in own]
        found.append(Compared(what, first[0] if first else "the first arm", differences))
    return found


def _measures(arms: Json) -> Json:
    """A best-of-n study's arms in the form of the summary of trained policies."""
    return {name: {"reward_seeds": arm.get("seeds"), **(arm.get("measures") or {})} for name, arm in arms.items()}


def _differences(summary: Json) -> Iterator[Difference]:
    for noise, arms in summary.items():
        for name, arm in arms.items():
            gold = (arm.get("final_gold") or {}).get("vs_baseline")
            if gold is None:
                continue
            interval = arm["final_gold"].get("vs_baseline_interval")
            # Of a single seed the bootstrap draws that seed again and again: an interval of no width, and no evidence.
            if not interval or None in interval or (arm.get("reward_seeds") or 0) < 2:
                yield Difference(noise, name, gold, None, "unclear")
                continue
            low, high = interval
            kind: Kind = "unclear" if low <= 0 <= high else "better" if gold > 0 else "worse"
            yield Difference(noise, name, gold, (low, high), kind)


def _counted(what: str, first: str, differences: list[Difference]) -> Verdict:
    """How many are what, in one sentence."""
    count = {kind: sum(one.kind == kind for one in differences) for kind in _ORDER}
    says = {"worse": "worse", "unclear": "not distinguishable from it", "better": "better"}
    kind: Kind = "worse" if count["worse"] else "better" if count["better"] else "unclear"
    listed = [f"{number} {'is' if number == 1 else 'are'} {says[kind]}" for kind, number in count.items()]
    number_of = f"{len(differences)} comparison{'s' if len(differences) > 1 else ''}"
    text = f"{what}, of {number_of} of final gold with {first}, {listed[0]}, {listed[1]} and {listed[2]}."
    return Verdict(kind, text)


def _named(what: str, first: str, differences: list[Difference]) -> Iterator[Verdict]:
    """The arms behind the count, one sentence for each kind."""
    says: dict[Kind, str] = {
        "worse": f"{what}, worse than {first}",
        "unclear": f"{what}, not distinguishable from {first}",
        "better": f"{what}, better than {first}",
    }
    for kind, text in says.items():
        found = [one for one in differences if one.kind == kind]
        found.sort(key=lambda one: 0.0 if kind == "unclear" else -abs(one.gold))
        named = found[:NUM_NAMED]
        by_arm = {arm: ", ".join(o.text for o in named if o.arm == arm) for arm in dict.fromkeys(o.arm for o in named)}
        parts = [f"{arm} ({where})" if kind == "unclear" else f"{arm} {where}" for arm, where in by_arm.items()]
        if parts:
            more = f"; and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
            yield Verdict(kind, f"{text}: {'; '.join(parts)}{more}.")


def _of_published(results: Json) -> Iterator[Verdict]:
    claims = published(results)
    if not claims:
        return
    failed = [claim for claim in claims if claim["replicated"] == "no"]
    if failed:
        listed = "; ".join(f"{c['claim']}: published {c['published']}, here {c['here']}" for c in failed[:NUM_NAMED])
        more = f"; and {len(failed) - NUM_NAMED} more" if len(failed) > NUM_NAMED else ""
        yield Verdict("worse", f"Of {len(claims)} published figures {len(failed)} not found here: {listed}{more}.")
    says: tuple[tuple[Kind, str, str], ...] = (
        ("unclear", "smaller", "found here too, but smaller"),
        ("unclear", "open", "open: the interval here holds both answers"),
        ("unclear", "not comparable", "not comparable: gold did not label the pairs here, and the pool is smaller"),
        ("better", "yes", "found here too"),
    )
    for kind, answer, text in says:
        if count := sum(claim["replicated"] == answer for claim in claims):
            yield Verdict(kind, f"Of {len(claims)} published figures {count} {text}.")


def _of_benchmarks(results: Json) -> Iterator[Verdict]:
    policies = (results.get("benchmarks") or {}).get("policies") or []
    averages = [(policy["name"], policy.get("average") or {}) for policy in policies]
    compared = [
        (name, average)
        for name, average in averages
        if average.get("difference") is not None and None not in (average.get("interval") or [None])
    ]
    directions: tuple[tuple[Kind, str], ...] = (("worse", "below"), ("better", "above"))
    for kind, says in directions:
        found = [
            f"{name} {signed(average['difference'], 3)} ({signed(average['interval'][0], 3)} to "
            f"{signed(average['interval'][1], 3)})"
            for name, average in compared
            if (average["interval"][1] < 0 if kind == "worse" else average["interval"][0] > 0)
        ]
        if found:
            yield Verdict(kind, f"On the average of the benchmarks, {says} {policies[0]['name']}: {'; '.join(found)}.")
    unclear = [name for name, average in compared if average["interval"][0] <= 0 <= average["interval"][1]]
    if unclear:
        text = (
            f"On the average of the benchmarks, not distinguishable from {policies[0]['name']}: {', '.join(unclear)}."
        )
        yield Verdict("unclear", text)


def caveats(results: Json) -> list[str]:
    """What the intervals count, and what they do not."""
    summary, pools = results.get("summary") or {}, results.get("best_of_n") or {}
    kinds = (
        ("after PPO Student’s, over", [arm.get("reward_seeds") for arms in summary.values() for arm in arms.values()]),
        (
            "at best-of-n by bootstrap, over prompts and",
            [arm.get("seeds") for arms in pools.values() for arm in arms.values()],
        ),
    )
    fewest = {how: min(count for count in counts if count) for how, counts in kinds if any(counts)}
    over = [f"{how} {count} reward model{'s' if count > 1 else ''} at fewest" for how, count in fewest.items()]
    found = [f"Intervals are 95\xa0% intervals: {'; '.join(over)}." if over else "There are no intervals."]
    after_ppo = fewest.get(kinds[0][0])
    if after_ppo == 1:
        found.append("One reward model decides nothing: nothing after PPO is called a difference.")
    elif after_ppo is not None and after_ppo < ENOUGH_SEEDS:
        found.append(
            f"{after_ppo} are few: such an interval is wide, and right if they differ about as a bell curve does."
        )
    ends = [
        arm["kl"]["mean"] for arms in summary.values() for arm in arms.values() if (arm.get("kl") or {}).get("mean")
    ]
    if ends and max(ends) > 1.5 * min(ends):
        found.append(
            f"Policies are compared where their training ended, at a mean KL of {min(ends):.0f} to {max(ends):.0f} "
            f"nats: a difference in gold may be one of distance alone, not of the reward."
        )
    own = (results.get("settings") or {}).get("arms") or []
    if others := {arm for arms in pools.values() for arm in arms} - {*own} if own else set():
        found.append(
            f"The sentences above are of the study’s own arms; best-of-n has {len(others)} more, in its table."
        )
    found.append(
        "Each interval stands for itself, with no correction for there being many: one in twenty would leave out a "
        "difference of zero by chance."
    )
    return found


def published(results: Json) -> list[Json]:
    """Published figures, those that did not replicate first."""
    return as_read_today(results.get("published") or [])
