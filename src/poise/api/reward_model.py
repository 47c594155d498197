"""A reward model as Python programs use it: every kind of heads that a run trained, on one trunk.

rm = RewardModel.from_pretrained("runs/rm")
rm.score("Review a film.", ["A warm film.", "Bad."]).mean      # (2, K)
rm.reward("lower_confidence(1)", ceiling=2)                    # for TRL's `reward_funcs`, and for PolicyTrainer
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.data.in_memory import Data, as_row, entries
from poise.data.preferences import iter_samples
from poise.data.rows import Understood
from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, Objective
from poise.integrations.trl_reward import RobustReward
from poise.models.head_kinds import (
    HeadSet,
    read_head_set,
    read_more_heads,
    same_trunk,
    write_more_heads,
)
from poise.models.loading import resolve_model
from poise.models.reward_model import HeadLayout, save_reward_model
from poise.models.run_heads import is_run, kind_for, kinds_in
from poise.models.scorer import Ensemble, Scorer
from poise.models.validator import validator_for
from poise.reward import push
from poise.reward.config import PushConfig
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, Run

_CARD = ("README.md", "calibration.png")


class RewardModel:
    """Heads of one or several kinds, ready to score. Made by `from_pretrained` or `RewardTrainer.train`.

    kind: of the heads that `score` and `layout` mean: `brme` of a run, or what `heads` has chosen; "" for a
    checkpoint that does not say.
    results: what training found on the validation pairs, by kind; empty if it is not known.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        kind: str,
        paths: Mapping[str, str] | None = None,
        cards: Mapping[str, Mapping[str, bytes]] | None = None,
    ):
        """scorers: by kind. paths: where each could be loaded again. cards: files of each one's model card."""
        self._scorers, self.kind, self._paths, self._cards = dict(scorers), kind, dict(paths or {}), dict(cards or {})
        self.results: Json = {}
        self._chosen = False

    def __repr__(self) -> str:
        """What a notebook shows: kinds of heads and how many of each, accuracy where it is known."""
        parts = []
        for kind, scorer in self._scorers.items():
            accuracy = (self.results.get(kind) or {}).get("validation_accuracy")
            known = f", {accuracy:.1%} of validation pairs" if accuracy is not None else ""
            parts.append(f"{kind or 'reward model'} ({scorer.layout.num_heads} heads{known})")
        return f"RewardModel: {', '.join(parts)}"

    @staticmethod
    def from_pretrained(path: str | Path, max_length: int = 0) -> "RewardModel":
        """From a `poise train-reward` run, a checkpoint folder, an ensemble, or a hub id.

        max_length: longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context.
        Raises PoiseError for a folder that holds no reward model.
        """
        path = str(path)
        if is_run(path):
            return _of_run(Path(path), max_length)
        scorer = Scorer.load(path, max_length)
        if isinstance(scorer, Ensemble):
            return RewardModel({"": scorer}, "", {"": path})
        folder = Path(resolve_model(path))
        kind, others = read_more_heads(folder)
        more = {name: _on_trunk_of(scorer, heads) for name, heads in others.items()}
        return RewardModel({kind: scorer, **more}, kind, {kind: path}, {kind: _card_in(folder)})

    # ---- heads ----

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of heads in this model: of a run `single`, `ensemble`, `posterior` and `brme`."""
        return tuple(self._scorers)

    def heads(self, kind: str) -> "RewardModel":
        """The same model, read through the heads of one kind. PoiseError if it has none of them."""
        if kind not in self.kinds:
            have = ", ".join(filter(None, self.kinds)) or "one kind, without a name"
            raise PoiseError(f"no heads {kind!r} in this reward model; it has {have}")
        chosen = RewardModel(self._scorers, kind, self._paths, self._cards)
        chosen.results, chosen._chosen = self.results, True
        return chosen

    @property
    def scorer(self) -> Scorer:
        """The heads of this kind with their trunk: samples in, HeadRewards out."""
        return self._scorers[self.kind]

    @property
    def layout(self) -> HeadLayout:
        """How many heads, of which form, and what their stds are worth."""
        return self.scorer.layout

    @property
    def path(self) -> str:
        """Where the model with these heads can be loaded again; "" if it is in memory only."""
        return self._paths.get(self.kind, "")

    def in_memory(self) -> "RewardModel":
        """The same model, without the places it came from: they will be gone."""
        kept = RewardModel(self._scorers, self.kind, cards=self._cards)
        kept.results, kept._chosen = self.results, self._chosen
        return kept

    # ---- rewards ----

    def score(self, prompt: Prompt | Data, completions: Any = None) -> HeadRewards:
        """Means and stds (N, K) of every head, on the CPU.

        prompt, completions: a prompt (text, or a conversation as turns) with its completions, N of them or one;
        or rows of `prompt` and `completion`: a list, a `datasets.Dataset`, a file.
        Raises PoiseError naming the row for one that cannot be read, an empty completion, say.
        """
        if completions is None:
            if isinstance(prompt, (str, Path)):
                return self.scorer(list(iter_samples(prompt)))
            rows = list(entries(prompt, "samples"))
        else:
            alone = isinstance(completions, str) or _is_turns(completions)
            several = [completions] if alone else entries(completions, "completions")
            rows = [{"prompt": prompt, "completion": completion} for completion in several]
        return self.scorer(_samples(rows))

    def reward(
        self,
        objective: str | Objective,
        *,
        ceiling: float | int = math.inf,
        floor: float | int = -math.inf,
        scale: str | Path = "",
        regret_bonus: float | int = 0.0,
        validator: str | Path | None = "",
    ) -> RobustReward:
        """One number per completion, for TRL's `reward_funcs` and for `PolicyTrainer`.

        objective: a name such as `tradeoff(0.4)`, or a function from HeadRewards (N, K) to rewards (N,). Heads are
        centered on the completions of the first call, and the rewards divided by their std there.
        ceiling, floor: bounds, in these stds. scale: JSON file that keeps these constants for a run that goes on.
        regret_bonus, validator: as of `RobustReward.load`.
        Of a model with several kinds of heads that none was chosen of, an objective reads the kind it was made for, and
        a line says which.
        """
        model = self
        if isinstance(objective, str) and len(self._scorers) > 1 and not self._chosen:
            model = self.heads(kind_for(objective))
            others = ", ".join(kind for kind in self.kinds if kind != model.kind)
            console.print(
                f"reward: {objective} of the {model.kind} heads (.heads(…) takes others: {others})", markup=False
            )
        return RobustReward.of(
            model.scorer, objective, path=model.path, scale=scale, floor=floor, ceiling=ceiling,
            regret_bonus=regret_bonus, validator=validator_for(model.path, validator),
        )  # fmt: skip

    # ---- keeping it ----

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder that any tool reads as a classifier: these heads, and beside them the other kinds.

        Kinds on a trunk of their own (`stage2_trunk`) are left out, and named. The folder must not exist, or be empty.
        """
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise PoiseError(f"{target} exists; choose another folder")
        if isinstance(self.scorer, Ensemble):
            raise PoiseError("an ensemble has no checkpoint of its own; its folder names its members")
        self._write(target)

    def push_to_hub(self, repo: str, *, private: bool = True, existing: bool = True) -> str:
        """Upload the checkpoint, as `poise push` does; returns its address. repo: `user/name`.

        private: of a new repository. existing: also into a repository that is there already.
        """
        with tempfile.TemporaryDirectory(prefix="poise-") as scratch:
            self.save_pretrained(Path(scratch) / "model")
            config = PushConfig(str(Path(scratch) / "model"), repo, private=private, existing=existing)
            return push.run(config)

    def _write(self, target: Path) -> None:
        own = self.scorer
        others = {kind: scorer for kind, scorer in self._scorers.items() if kind != self.kind}
        apart = [kind for kind, scorer in others.items() if scorer.extract is not own.extract]
        if apart:
            console.print(f"left out, on a trunk of their own: {', '.join(apart)}; .heads(…) saves them")
        model, tokenizer = own.extract.classifier, own.extract.tokenizer
        save_reward_model(target, model, tokenizer, own.weight, own.layout, own.last_layer, own.reference)
        together = {kind: scorer for kind, scorer in others.items() if kind not in apart}
        if self.kind:
            heads = {kind: HeadSet(one.weight, one.layout, one.last_layer) for kind, one in together.items()}
            write_more_heads(target, self.kind, heads)
        for name, content in self._cards.get(self.kind, {}).items():
            (target / name).write_bytes(content)


def _of_run(folder: Path, max_length: int) -> RewardModel:
    """Every kind of a run. The first one's trunk serves all that share it; another is loaded by itself."""
    kinds: list[str] = [*kinds_in(folder)]
    kind = "brme" if "brme" in kinds else kinds[0]
    scorers = {kind: Scorer.load(str(folder / kind), max_length)}
    for other in kinds:
        if other == kind:
            continue
        twin = next((name for name in scorers if same_trunk(folder / name, folder / other)), None)
        scorers[other] = (
            Scorer.load(str(folder / other), max_length)
            if twin is None
            else _on_trunk_of(scorers[twin], read_head_set(folder / other))
        )
    paths: dict[str, str] = {name: str(folder / name) for name in kinds}
    cards: dict[str, Mapping[str, bytes]] = {name: _card_in(folder / name) for name in kinds}
    model = RewardModel({name: scorers[name] for name in kinds}, kind, paths, cards)
    model.results = (Run(folder).results or {}).get("models", {})
    return model


def _on_trunk_of(scorer: Scorer, heads: HeadSet) -> Scorer:
    """Heads as loading their checkpoint would give them: rounded to the dtype of the trunk."""
    classifier = scorer.extract.classifier
    weight = heads.weight.to(classifier.device, classifier.dtype).float()
    layout = heads.layout.with_reference(scorer.reference)  # distances are the trunk's, whichever heads read it
    return Scorer(scorer.extract, weight, layout, heads.last_layer, scorer.reference)


def _card_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _CARD if (folder / name).exists()}


def _is_turns(value: Any) -> bool:
    """Is this one conversation, not a list of completions?"""
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _samples(rows: Sequence[Any]) -> list[Sample]:
    numbered = ((number, as_row(row, number, "samples")) for number, row in enumerate(rows, 1))
    return list(iter_samples("samples", understood=Understood("samples", in_memory=True), rows=numbered))
