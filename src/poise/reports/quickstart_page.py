"""The report: one self-contained HTML page from the JSON of a finished quickstart. No model, no torch, no network.

    FOLDER/comparison/results.json   the arms trained by PPO and their differences: the one file that must be there
    FOLDER/pool/results.json         best-of-n study of the initial policy
    FOLDER/reward/results.json       reward models
    FOLDER/results.json              seconds per stage
    FOLDER/config.yaml, FOLDER/environment.json

Whatever else is missing leaves its section out. All text from the runs is escaped by the template; the only markup
let through is what `plots` drew.
"""

import functools
import shlex
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from markupsafe import Markup

from poise.errors import PoiseError, first_line
from poise.reports import plots
from poise.reports.plot_style import on_pages
from poise.runtime.display import visible, visible_values
from poise.runtime.records import Json, read_object
from poise.runtime.run_folder import write_atomic

NUM_COMPLETIONS = 12
PPO_PHASES = ("sample", "score", "reference", "update")
REWARD_MODELS = {
    "single": "one Bradley–Terry head",
    "ensemble": "the same head on bootstraps of the preferences",
    "brme": "Gaussian heads fitted to it",
    "posterior": "heads drawn from its posterior",
}


class Study(NamedTuple):
    """What a quickstart folder holds; None for what it does not."""

    comparison: Json
    pool: Json | None
    reward: Json | None
    timing: Json | None
    environment: Json | None
    config: str | None


class Verdict(NamedTuple):
    """What one difference between two arms says, as a sentence."""

    kind: Literal["better", "worse", "unclear"]
    text: str


def one_line_if_damaged(build: Callable[[str | Path], Path]) -> Callable[[str | Path], Path]:
    """A page's `build(folder)` that raises PoiseError, one line, for results that do not fit the page.

    The files may be of another version, cut off or edited: a page reads hundreds of fields, and any may be wrong.
    """

    @functools.wraps(build)
    def checked(folder: str | Path) -> Path:
        try:
            return build(folder)
        except PoiseError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.TemplateError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise PoiseError(f"{folder}: results that no page can be made of, or of another version ({why})") from error

    return checked


@one_line_if_damaged
def build(folder: str | Path) -> Path:
    """Write FOLDER/report.html and return its path. PoiseError if the folder is not a finished quickstart."""
    path = Path(folder) / "report.html"
    write_atomic(path, html(folder))
    return path


def html(folder: str | Path) -> str:
    """The page as text."""
    return page_template("quickstart.html.j2").render(_page(read_study(folder)))


def save_png(folder: str | Path, path: str | Path) -> None:
    """Write the report's first figure, gold and proxy against √KL, as a PNG for a README."""
    study = read_study(folder)
    plots.save_over_optimization(study.comparison, study.pool, path)


def read_study(folder: str | Path) -> Study:
    """Read a quickstart folder. PoiseError, one line, if the comparison is missing or a file is damaged."""
    folder = Path(folder)
    comparison = read_json(folder / "comparison" / "results.json")
    if comparison is None:
        raise PoiseError(
            f"{folder} has no comparison/results.json: not a finished quickstart; "
            f"run poise quickstart --output {folder}"
        )
    if not comparison.get("arms"):
        raise PoiseError(f"{folder}/comparison/results.json lists no arms: there is nothing to report")
    config = folder / "config.yaml"
    return Study(
        comparison,
        pool=read_json(folder / "pool" / "results.json"),
        reward=read_json(folder / "reward" / "results.json"),
        timing=read_json(folder / "results.json"),
        environment=read_json(folder / "environment.json"),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )


def read_json(path: Path) -> Json | None:
    """An object from a file, its texts `visible`; None if there is none, one line if it is damaged."""
    return visible_values(read_object(path)) if path.exists() else None


# ---- the answer ----


def verdict(difference: Json, comparison: Json) -> Verdict:
    """One difference in final gold as a sentence that does not claim more than its interval."""
    arms = {arm["name"]: arm for arm in comparison["arms"]}
    arm, against = arms[difference["arm"]], arms[difference["against"]]
    gold, interval = difference["gold"], difference.get("interval")
    who = f"The {_spoken(arm)} policy"
    ended = f"ended at gold {_final_gold(arm)}, the {_spoken(against)} one at {_final_gold(against)}"
    if gold is None or not interval or None in interval:
        return Verdict("unclear", f"{who} {ended}: {signed(gold)}, with no interval to judge it by.")
    low, high = interval
    digits = 3 if min(abs(gold), abs(low), abs(high)) < 0.005 else 2  # no "+0.00" that is said not to be zero
    count = difference.get("num_prompts")
    prompts = f"{count} held-out prompts" if count else "the held-out prompts"
    shown = f"(95\xa0% interval {signed(low, digits)} to {signed(high, digits)} over {prompts})"
    if low <= 0.0 <= high:
        text = f"{who} {ended}: {signed(gold, digits)}, not distinguishable from zero {shown}."
        return Verdict("unclear", text)
    if gold < 0.0:
        return Verdict("worse", f"{who} did worse: it {ended}, a difference of {signed(gold, digits)} {shown}.")
    return Verdict("better", f"{who} {ended}: {signed(gold, digits)} {shown}.")


def _verdicts(comparison: Json) -> list[Verdict]:
    found = [verdict(difference, comparison) for difference in comparison.get("differences") or []]
    if found:
        return found
    arm = comparison["arms"][0]
    text = f"The {_spoken(arm)} policy ended at gold {_final_gold(arm)}; it was compared with no other."
    return [Verdict("unclear", text)]


def _spoken(arm: Json) -> str:
    """What a sentence calls an arm: its label up to a colon (`robust: lower bound of …`), else its name."""
    short, colon, _ = (arm.get("label") or "").partition(":")
    return short if colon else arm["name"].replace("_", " ")


def _final_gold(arm: Json) -> str:
    return signed((arm.get("final") or {}).get("gold"))


# ---- the page ----


def _page(study: Study) -> Json:
    """What the template is given."""
    comparison, reward, timing = study.comparison, study.reward or {}, study.timing or {}
    arms = comparison["arms"]
    styles = plots.arm_styles(comparison, study.pool)
    history = reward.get("stage2_history")
    environment = study.environment or {}
    return {
        "verdicts": _verdicts(comparison),
        "arms": arms,
        "initial_variety": (comparison.get("initial") or {}).get("distinct_bigrams"),
        "colors": {name: on_pages(style.color) for name, style in styles.items()},
        "curves_svg": Markup(plots.over_optimization(comparison, study.pool)),
        "pool": study.pool,
        "heads_svgs": [
            (arm, Markup(plots.heads(arm, styles[arm["name"]], f"heads{i}")))
            for i, arm in enumerate(arms)
            if any(len(row.get("heads") or []) > 1 for row in arm["steps"])
        ],
        "stage2_svg": Markup(plots.stage2(history)) if history else None,
        "reward": reward,
        "reward_models": _reward_models(reward, study.pool),
        "completions": [_completion(item, arms) for item in (comparison.get("completions") or [])[:NUM_COMPLETIONS]],
        "timing": timing,
        "step_costs": [(arm, arm["step_seconds"]) for arm in arms if arm.get("step_seconds")],
        "phases": PPO_PHASES,
        "config": study.config,
        "environment": environment,
        "command": shlex.join(environment.get("command") or []),
    }


def _reward_models(reward: Json, pool: Json | None) -> list[Json]:
    """Rows of the reward-model table."""
    spread = {item["reward"]: item for item in (pool or {}).get("head_spread") or []}
    count = reward.get("num_validation")
    rows = []
    for name, model in (reward.get("models") or {}).items():
        accuracy = model.get("validation_accuracy")
        error = sqrt(accuracy * (1 - accuracy) / count) if accuracy is not None and count else None
        rows.append(
            {
                "name": name, "label": REWARD_MODELS.get(name, name), "num_heads": model.get("num_heads"),
                "accuracy": accuracy, "error": error, "auroc": model.get("auroc_wrong_order") or {},
                "spread": spread.get(name, {}) if model.get("num_heads", 1) > 1 else {},
            }
        )  # fmt: skip
    return rows


def _completion(item: Json, arms: list[Json]) -> Json:
    """One prompt and what every arm wrote for it, in the order of the arms."""
    answers = [(arm, item["arms"][arm["name"]]) for arm in arms if arm["name"] in item["arms"]]
    return {"prompt": item["prompt"], "over_scored": item.get("over_scored"), "answers": answers}


def _finalized(value: Any) -> Any:
    """What an expression of a template shows: text of others with visible escapes, our own figures as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def page_template(name: str) -> jinja2.Template:
    """A template beside this file, with the number filters of all pages; everything it is given is escaped."""
    return _templates().get_template(name)


@functools.cache
def _templates() -> jinja2.Environment:
    """It keeps what it has compiled: half of the time of a page that is written anew while a run goes on."""
    loader = jinja2.PackageLoader("poise.reports")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalized
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration}
    return environment


# ---- numbers as text; what is missing is a dash ----

_MISSING = "–"


def number(value: Any, digits: int = 2) -> str:
    """A number with a proper minus sign.

    >>> number(-0.5), number(-0.001), number(None)
    ('−0.50', '0.00', '–')
    """
    return _MISSING if _is_missing(value) else f"{value:z.{digits}f}".replace("-", "−")


def signed(value: Any, digits: int = 2) -> str:
    """A number that always says its sign.

    >>> signed(0.5), signed(-0.5), signed(0)
    ('+0.50', '−0.50', '0.00')
    """
    if _is_missing(value):
        return _MISSING
    return number(value, digits) if value == 0 else f"{value:+z.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.694)
    '69.4\\xa0%'
    """
    return _MISSING if _is_missing(value) else f"{100 * value:.{digits}f}\xa0%"


def duration(seconds: Any) -> str:
    """Seconds as a person would say them.

    >>> duration(41.2), duration(210), duration(3700)
    ('41\\xa0s', '3\\xa0min 30\\xa0s', '1\\xa0h 1\\xa0min')
    """
    if _is_missing(seconds):
        return _MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\xa0s"
    if whole < 3600:
        return f"{whole // 60}\xa0min {whole % 60}\xa0s"
    return f"{whole // 3600}\xa0h {whole % 3600 // 60}\xa0min"


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, jinja2.Undefined)
