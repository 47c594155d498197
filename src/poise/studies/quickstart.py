"""The quickstart: one recipe made of the same commands that run on any files.

Each stage is a run folder of its own inside RUN, and is skipped if it is complete; a stopped quickstart goes on
where it was. Nothing here computes; it chooses configs. The choices were fixed before the seeds that the README shows,
and none was made on gold.
"""

import functools
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poise.data.human_ratings import Rated, human_ratings, is_held_out, judged_by_all, preference_pairs
from poise.data.preferences import write_preferences
from poise.data.types import Prompt
from poise.models.loading import resolve_model
from poise.policy import train as train_policy
from poise.reports import live, policy_card, reward_card
from poise.reports import quickstart_page as report
from poise.reward import train as train_reward
from poise.runtime.progress import console
from poise.runtime.run_folder import Run, config_dict, write_jsonl
from poise.runtime.settings import NotNegative
from poise.studies import best_of_n, compare
from poise.studies.arms import Arm
from poise.studies.config import LAPTOP_POLICY, LAPTOP_REWARD, REVIEWS
from poise.studies.config import QuickstartConfig as Config

# What the reviews are about. Policies are trained on one half and evaluated on the other.
TRAIN_FILMS = (
    "love", "war", "a lost dog", "a bank robbery", "growing up", "a haunted house", "two brothers", "space travel",
    "a wedding", "a spy", "cooking", "a school", "chess", "the sea", "a murder", "robots", "a road trip", "a king",
    "football", "a train",
)  # fmt: skip
TRAIN_PRODUCTS = (
    "phone", "camera", "vacuum cleaner", "laptop", "coffee machine", "backpack", "pair of headphones", "printer",
    "toaster", "DVD player", "lamp", "router", "tent", "watch", "keyboard", "chair", "MP3 player", "blender",
    "bicycle", "mattress",
)  # fmt: skip
EVAL_FILMS = (
    "a divorce", "a prison", "a singer", "an island", "a detective", "dinosaurs", "a farm", "a hospital", "boxing",
    "a painter", "time travel", "a storm", "a teacher", "vampires", "a taxi driver", "a friendship", "ballet",
    "a trial", "a mountain", "a circus",
)  # fmt: skip
EVAL_PRODUCTS = (
    "tablet", "kettle", "pair of shoes", "television", "game console", "suitcase", "microphone", "drill", "heater",
    "scooter", "pan", "pen", "guitar", "desk", "jacket", "car seat", "scanner", "hair dryer", "projector", "pillow",
)  # fmt: skip


def review_prompt(subject: str) -> Prompt:
    """Ask for a one-sentence review of a subject."""
    return [
        {"role": "system", "content": "You write short reviews."},
        {"role": "user", "content": f"Write a one-sentence review of {subject}."},
    ]


# The human texts answer the same question, without a subject: it is not known what film a snippet is about.
RATED_DOMAINS = {"movieReviewSnippets": review_prompt("a film"), "amazonReviewSnippets": review_prompt("a product")}


ARMS = {
    "conventional": Arm("single", "nominal", "conventional: one Bradley–Terry head"),
    # The ceiling: one in forty of the initial policy's completions gets this reward, and higher ones are not trusted.
    # The learning rate falls to zero as the mean reward reaches the ceiling.
    "robust": Arm(
        "posterior", "lower_confidence(1)", "robust: lower bound of posterior heads, at most +2",
        {"reward_ceiling": 2.0, "settle": True},
    ),
    "brme": Arm("brme", "tradeoff(0.4)", "BRME: nominal and worst case of Gaussian heads"),
}  # fmt: skip


@dataclass(frozen=True)
class _Stage:
    """A row of metrics.jsonl."""

    stage: str
    seconds: NotNegative


def run(config: Config) -> Run:
    """Run every stage that is not complete; returns the run, with report.html in its folder."""
    out = Run.open(config.output, config, lambda: {"--model": [Path(resolve_model(config.model))]})
    folder = out.folder
    console.print(f"Poise quickstart in {folder}; its page from the first minutes: {folder / 'report.html'}")
    with live.refreshed(folder):
        _stages(config, out)
    seconds: dict[str, float] = {}
    for line in out.metrics(_Stage):
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    out.finish(
        {
            "stages": [{"name": name, "seconds": round(value, 1)} for name, value in seconds.items()],
            "total_seconds": round(sum(seconds.values()), 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
    )
    report.build(folder)
    return out


def _stages(config: Config, out: Run) -> None:
    """Every stage that is not complete."""
    folder = out.folder
    _stage(out, "model and data", lambda: _prepare(config, folder))
    reward = replace(
        LAPTOP_REWARD, preferences=str(folder / "preferences.jsonl"), output=str(folder / "reward"),
        model=config.model, seed=config.seed,
    )  # fmt: skip
    _stage(out, "reward models", lambda: _train_reward(reward))
    pool = best_of_n.Config(
        prompts=str(folder / "eval_prompts.jsonl"), reward=(str(folder / "reward"),), output=str(folder / "pool"),
        model=config.model, seed=config.seed, gold=REVIEWS,
        objectives=tuple(f"{arm.reward}:{arm.objective}" for arm in ARMS.values()),
    )  # fmt: skip
    _stage(out, "best-of-n pool", lambda: best_of_n.run(pool))
    arms = {name: ARMS[name] for name in config.arms}
    for name, arm in arms.items():
        policy = replace(
            LAPTOP_POLICY, prompts=str(folder / "prompts.jsonl"), eval_prompts=str(folder / "eval_prompts.jsonl"),
            reward=str(folder / "reward" / arm.reward), output=str(folder / f"policy-{name}"),
            model=config.model, kl_coef=config.kl_coef, num_steps=config.num_steps, seed=config.seed,
        )  # fmt: skip
        _stage(out, f"PPO, {name}", functools.partial(_train_policy, arm.applied(policy)))
    comparison = compare.Config(
        arms=tuple(str(folder / f"policy-{name}") for name in arms), labels=tuple(arm.label for arm in arms.values()),
        pool=str(folder / "pool"), output=str(folder / "comparison"), gold=REVIEWS,
    )  # fmt: skip
    _stage(out, "comparison", lambda: compare.run(comparison))


def _train_reward(config: train_reward.Config) -> None:
    """Train, and write a card into every reward model."""
    done = Run(Path(config.output)).results is not None
    run = train_reward.run(config)
    if not done:
        reward_card.write_cards(run, config_dict(config))


def _train_policy(config: train_policy.Config) -> None:
    done = Run(Path(config.output)).results is not None
    run = train_policy.run(config)
    if not done:
        policy_card.write_card(run, config_dict(config))


def _prepare(config: Config, folder: Path) -> None:
    resolve_model(config.model)
    if not (folder / "eval_prompts.jsonl").exists():
        pairs = preference_pairs(_rated(), RATED_DOMAINS.__getitem__, config.num_preferences, config.seed)
        write_preferences(folder / "preferences.jsonl", pairs)
        write_prompts(folder)


def study_files(folder: Path, num_pairs: int = 4000) -> None:
    """Files of the standard study: raters.jsonl, pairs as single raters judged them; preferences.jsonl, the same by
    the mean of all raters; and the quickstart's prompts."""
    if not (folder / "eval_prompts.jsonl").exists():
        rated = _rated()
        pairs = preference_pairs(rated, RATED_DOMAINS.__getitem__, num_pairs, seed=0)
        write_preferences(folder / "raters.jsonl", pairs)
        write_preferences(folder / "preferences.jsonl", judged_by_all(pairs, rated))
        write_prompts(folder)


def _rated() -> list[Rated]:
    return [text for text in human_ratings() if text.domain in RATED_DOMAINS and not is_held_out(text.text)]


def review_prompts(films: Sequence[str], products: Sequence[str]) -> list[Prompt]:
    """A prompt for each film and each product."""
    subjects = [f"a film about {film}" for film in films] + [f"a {product}" for product in products]
    return [review_prompt(subject) for subject in subjects]


def write_prompts(folder: Path) -> None:
    """Prompts to train on, prompts.jsonl, and others to evaluate on, eval_prompts.jsonl."""
    for name, films, products in (
        ("prompts", TRAIN_FILMS, TRAIN_PRODUCTS),
        ("eval_prompts", EVAL_FILMS, EVAL_PRODUCTS),
    ):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in review_prompts(films, products)])


def _stage(out: Run, name: str, work: Callable[[], object]) -> None:
    """Run a stage and add what it took, also if it is stopped half-way and goes on another day."""
    started = time.monotonic()
    try:
        work()
    finally:
        out.log(stage=name, seconds=time.monotonic() - started)
