"""`poise train-reward`: preferences in; a conventional reward model and two multi-head ones out.

    RUN/single      stage 1: one point head, Bradley-Terry: the conventional reward model
    RUN/brme        stage 2: K Gaussian heads fitted to the standardized stage-1 reward (arXiv 2409.15360)
    RUN/posterior   K point heads drawn from the Laplace posterior of stage 1: their spread grows with the distance
                    from the preference data, which that of the BRME heads hardly does

All three share one trunk, the first layers of the model: as it is, or tuned in stage 1 (RUN/trunk, and RUN/adapter for
LoRA). Its features are computed once, and kept in the feature cache.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from poise.data.evaluation_sets import Item, Questions
from poise.data.preferences import OnBadRow, read_preferences
from poise.data.types import Preference, Sample
from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.models.loading import DEFAULT_MODEL, HfModel, frozen_dtype
from poise.models.reward_model import HeadLayout, LastLayer, load_trunk, save_reward_model, with_heads
from poise.models.scorer import FeatureExtractor, Scorer
from poise.models.shared_prompt import takes_packed_rows
from poise.reward.heads import (
    HeadLossName,
    Heads,
    Pairs,
    ShardKind,
    Shards,
    Targets,
    choose_prior,
    draw_posterior,
    fit_ensemble,
    fit_std_scale,
    make_shards,
    posterior_factor,
    std_collapsed,
    train_heads,
)
from poise.reward.quality import Opinions, judge_pairs, pairs_of
from poise.reward.trunk_training import (
    Loss,
    TrunkTraining,
    fine_tune,
    fresh_head,
    gaussian_loss,
    preference_loss,
    token_pairs,
)
from poise.runtime.progress import console, progress
from poise.runtime.run_folder import Json, Run, is_main_process

Trunk = Literal["frozen", "lora", "full"]


@dataclass(frozen=True)
class Config:
    """Train a conventional reward model and a multi-head one from preferences."""

    preferences: str
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id."""
    output: str = "runs/reward"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model whose first layers become the trunk."""
    num_layers: int = 8
    """Layers of the model to keep as trunk; 0 keeps all."""
    max_length: int = 1024
    """Longest sample in tokens; longer ones lose their oldest tokens, which is reported."""
    validation_share: float = 0.2
    """Share of the preferences held out to choose the prior and to report accuracy."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be the wrong way round, in [0, 0.5)."""
    trunk: Trunk = "frozen"
    """What stage 1 trains beside the head: nothing, LoRA adapters (merged afterwards), or every weight."""
    stage2_trunk: Trunk = "frozen"
    """The same for stage 2, which starts from the heads on the frozen trunk; the BRME then has a trunk of its own."""
    epochs: float = 1.0
    """Passes over the preferences, if the trunk is trained."""
    learning_rate: float = 0.0
    """Of the trunk; 0 takes 2e-4 for LoRA and 1e-5 for all weights."""
    batch_size: int = 16
    """Preferences per optimizer step, if the trunk is trained."""
    device_batch_size: int = 8
    """Preferences per forward pass and device; memory grows with it."""
    lora_rank: int = 16
    """Rank of the adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time, much less memory."""
    save_steps: int = 25
    """Optimizer steps between the checkpoints of the trunk."""
    num_heads: int = 5
    """K of the BRME."""
    shards: ShardKind = "cluster"
    """Which pairs each BRME head is trained on: its own part (`disjoint` at random, `cluster` by content, `source` by
    the rows' `source`), a random 80 % of all (`bootstrap`), or all (`same`)."""
    head_loss: HeadLossName = "sampled_mse"
    """Loss of stage 2. `sampled_mse` is the paper's: its std counts coverage. The next three are proper scores: their
    std is an error bar, but the head with the lowest is then the least noisy one, not the most knowing. The last
    fits the preferences themselves."""
    head_steps: int = 600
    """Most optimizer steps of stage 2; it stops early when validation error rises."""
    head_lr: float = 3e-3
    """Learning rate of stage 2 (Adam)."""
    posterior_heads: int = 64
    """Heads to draw from the posterior; few leave directions in which they agree by chance, and many cost little."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder, for other heads, seeds and losses on the same texts."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Of the validation split, the training of the trunk, the shards and the heads."""


def run(config: Config) -> Run:
    """Train, evaluate and save; a finished run is returned as it is."""
    _check(config)
    out = Run.open(config.output, config)
    if out.results is not None:
        return out
    data = Data.read(config)
    extract = _trunk(config, out, data.fit_on)
    raw = pair_features(extract, data.preferences)
    trained = _train(config, extract, data, raw)
    features = dict.fromkeys(trained.models, raw.rows(data.validation))
    if config.stage2_trunk != "frozen":
        trained.models["brme"] = _tune_brme(config, out, trained, data)
        features["brme"] = pair_features(trained.models["brme"].extract, data.held_out)

    results: Json = {}
    for name, (weight, layout, last_layer, trunk) in trained.models.items():
        if is_main_process():
            save_reward_model(out.folder / name, trunk.classifier, trunk.tokenizer, weight, layout, last_layer)
        scorer = Scorer(trunk, weight, layout, last_layer)
        results[name] = {"num_heads": layout.num_heads, **_evaluate(scorer, features[name], data.held_out, config.seed)}
    collapsed = std_collapsed(trained.history)
    if extract.num_truncated:
        console.print(f"{extract.num_truncated} samples lost their oldest tokens (longer than {extract.max_length})")
    if collapsed:
        console.print(
            "[bold red]std collapse:[/] the heads' std fell more than 10x while validation error stood still; "
            "do not read it as an error bar"
        )
    if is_main_process():
        out.finish(
            {
                "num_preferences": len(data.preferences), "num_train": len(data.train),
                "num_validation": len(data.validation),
                "num_truncated": extract.num_truncated, "num_layers": extract.classifier.config.num_hidden_layers,
                "prior_precision": trained.precision, "stage1_reward_std": trained.models["single"].layout.reward_scale,
                "stage2_history": trained.history, "std_collapsed": collapsed, "models": results,
            }
        )  # fmt: skip
        for folder in (out.folder / "trainer", out.folder / "stage2" / "trainer"):
            shutil.rmtree(folder, ignore_errors=True)  # checkpoints of trunks that are finished
    return out


def heads_in_memory(config: Config, extract: FeatureExtractor) -> "dict[str, Model]":
    """The reward models of a config with a frozen trunk, by name, without writing a run.

    extract: of that trunk, which several configs may share.
    """
    _check(config)
    if config.trunk != "frozen" or config.stage2_trunk != "frozen":
        raise PoiseError("reward models with a trunk of their own are trained as runs")
    data = Data.read(config)
    return _train(config, extract, data, pair_features(extract, data.preferences)).models


def _check(config: Config) -> None:
    if config.num_heads < 1 or config.posterior_heads < 2:
        raise PoiseError("--num-heads must be at least 1 and --posterior-heads at least 2")
    if not 0.0 < config.validation_share < 1.0:
        raise PoiseError("--validation-share must be between 0 and 1")
    if not 0.0 <= config.label_smoothing < 0.5:
        raise PoiseError("--label-smoothing must be at least 0 and less than 0.5")


class Data(NamedTuple):
    """The preferences, and which are trained on."""

    preferences: list[Preference]
    train: Tensor
    validation: Tensor
    generator: torch.Generator

    @classmethod
    def read(cls, config: Config) -> "Data":
        preferences = read_preferences(config.preferences, config.on_bad_row)
        count = len(preferences)
        num_validation = max(1, round(count * config.validation_share))
        if count - num_validation < 2:
            raise PoiseError(f"{count} preferences are too few to train on")
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(count, generator=generator)
        return cls(preferences, order[num_validation:], order[:num_validation], generator)

    @property
    def fit_on(self) -> list[Preference]:
        return [self.preferences[i] for i in self.train]

    @property
    def held_out(self) -> list[Preference]:
        return [self.preferences[i] for i in self.validation]


# ---- the trunk ----


def _trunk(config: Config, out: Run, preferences: list[Preference]) -> FeatureExtractor:
    """The trunk whose features the heads read: the model's own, or RUN/trunk, which stage 1 tunes on `preferences`."""
    if config.trunk == "frozen" or (out.folder / "trunk").exists():
        classifier, tokenizer = load_trunk(*trunk_source(config, out.folder))
    else:
        # Weights that are trained need more digits than bfloat16 has, also where it does the arithmetic.
        classifier, tokenizer = load_trunk(config.model, config.num_layers, dtype=torch.float32)
        fresh_head(classifier, config.seed)
        extract = FeatureExtractor(classifier, tokenizer, config.max_length)
        loss = preference_loss(config.label_smoothing)
        classifier = _tune(config, config.trunk, extract, preferences, loss, out.folder)
        if is_main_process():
            head = classifier.score.weight.data
            save_reward_model(out.folder / "trunk", classifier, tokenizer, head, HeadLayout(1, "point", (0.0,)))
    return FeatureExtractor(classifier.to(frozen_dtype()), tokenizer, config.max_length, cached=config.feature_cache)


def trunk_source(config: Config, folder: Path) -> tuple[str, int]:
    """(model, layers of it to keep) that stage 1 leaves a run in `folder` with, as `load_trunk` takes them."""
    return (config.model, config.num_layers) if config.trunk == "frozen" else (str(folder / "trunk"), 0)


def _tune(
    config: Config,
    kind: Trunk,
    extract: FeatureExtractor,
    preferences: list[Preference],
    loss: Loss,
    folder: Path,
    **targets_and_mask: Tensor,
) -> HfModel:
    """The classifier of `extract`, trained; `targets_N2` and `mask_NK` as `token_pairs` takes them."""
    classifier, packed = extract.classifier, takes_packed_rows(extract.classifier)
    pairs = token_pairs(extract, preferences, share=packed, **targets_and_mask)
    names = TrunkTraining.__dataclass_fields__.keys() - {"kind"}
    how = TrunkTraining(kind=kind, **{name: getattr(config, name) for name in names})
    return fine_tune(classifier, extract.tokenizer.pad_token_id, pairs, loss, how, folder, packed=packed)


def pair_features(extract: FeatureExtractor, preferences: list[Preference]) -> Pairs:
    """What the trunk makes of each pair's texts, float64, as it gives them."""
    samples = [Sample(p.prompt, p.chosen) for p in preferences] + [Sample(p.prompt, p.rejected) for p in preferences]
    with progress("reward model: trunk features", len(samples)) as advance:
        chosen, rejected = extract(samples, advance).cpu().double().split(len(preferences))
    return Pairs(chosen, rejected, torch.tensor([p.margin for p in preferences], dtype=torch.float64))


class Model(NamedTuple):
    """A reward model to be saved: heads on the features of a trunk."""

    weight: Tensor
    layout: HeadLayout
    last_layer: LastLayer | None
    extract: FeatureExtractor


class HeadTraining(NamedTuple):
    """What came of the training on features."""

    models: dict[str, Model]
    precision: float  # of the prior
    shards: Shards
    targets: Targets
    history: list[Json]


def _train(config: Config, extract: FeatureExtractor, data: Data, raw: Pairs) -> HeadTraining:
    """Stage 1's head, its posterior, and stage 2's heads: everything that reads features only."""
    train = raw.rows(data.train).texts_NH
    center, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    pairs = raw.standardized(center, scale)
    fit, held = pairs.rows(data.train), pairs.rows(data.validation)

    precision, weight_H = choose_prior(fit, held, config.label_smoothing)
    rewards = fit.texts_NH @ weight_H
    middle, std = rewards.mean(), rewards.std().clamp_min(1e-12)
    # From here on the stage-1 reward is standardized: mean 0, std 1 over the training texts.
    single = Heads((weight_H / std).unsqueeze(0), (middle / std).unsqueeze(0), "point")
    sources = ([p.source for p in rows] for rows in (data.fit_on, data.held_out))
    shards = make_shards(config.shards, fit, held, config.num_heads, data.generator, *sources)
    targets = Targets.of(single, fit, held)
    brme, history = train_heads(
        fit, held, targets, shards, data.generator, loss_name=config.head_loss, num_steps=config.head_steps,
        learning_rate=config.head_lr, initial_std=single.weight_LH.std().item(),
    )  # fmt: skip
    factor = posterior_factor(fit, weight_H, precision)
    draws = draw_posterior(weight_H, factor, config.posterior_heads, data.generator) / std
    posterior = Heads(draws, single.offset_L.expand(len(draws)), "point")
    members = fit_ensemble(fit, precision, config.num_heads, data.generator, config.label_smoothing) / std
    ensemble = Heads(members, (fit.texts_NH @ members.T).mean(0), "point")
    # A draw moves a reward by (F z).x; on features as the trunk gives them, in units of the standardized reward, F is
    # F / (scale std).
    last_layers = {"posterior": LastLayer(factor / scale.unsqueeze(-1) / std, center)}
    models = {}
    for name, heads in {"single": single, "ensemble": ensemble, "posterior": posterior, "brme": brme}.items():
        weight, layout = heads.on_raw_features(center, scale, std.item())
        models[name] = Model(weight, layout, last_layers.get(name), extract)
    models["brme"] = _calibrated(models["brme"], raw.rows(data.validation), targets)
    return HeadTraining(models, precision, shards, targets, history)


def _calibrated(model: Model, held: Pairs, targets: Targets) -> Model:
    """With the scale at which each head's std is an error bar for the validation targets."""
    said = model.layout.decode(held.texts_NH @ model.weight.double().T)
    std_scale = tuple(fit_std_scale(said.mean, said.std, targets.held_T).tolist())
    return model._replace(layout=replace(model.layout, std_scale=std_scale))


def _tune_brme(config: Config, out: Run, trained: HeadTraining, data: Data) -> Model:
    """Stage 2 with the trunk: from the heads on frozen features, toward the same targets."""
    start = trained.models["brme"]
    classifier, tokenizer = load_trunk(*trunk_source(config, out.folder), dtype=torch.float32)
    with_heads(classifier, start.weight)
    extract = FeatureExtractor(classifier, tokenizer, config.max_length)
    classifier = _tune(
        config, config.stage2_trunk, extract, data.fit_on, gaussian_loss(start.layout, config.head_loss),
        out.folder / "stage2", targets_N2=trained.targets.fit_T.view(2, -1).T, mask_NK=trained.shards.fit_NK,
    )  # fmt: skip
    weight = classifier.score.weight.data.float().cpu()
    extract = FeatureExtractor(classifier.to(frozen_dtype()), tokenizer, config.max_length, cached=config.feature_cache)
    model = start._replace(weight=weight, extract=extract)
    return _calibrated(model, pair_features(extract, data.held_out), trained.targets)


# ---- evaluation on held-out preferences ----


def _evaluate(scorer: Scorer, held: Pairs, preferences: list[Preference], seed: int) -> Json:
    """On the validation pairs, which chose the prior and when to stop: `poise evaluate-reward` judges on others."""
    items = [Item(p.prompt, (p.chosen,), (p.rejected,)) for p in preferences]
    alternating = torch.stack([held.chosen_NH, held.rejected_NH], 1).flatten(0, 1)
    says = Opinions(scorer.decode(alternating.float()), scorer.layout, scorer.last_layer, alternating)
    judged = judge_pairs(pairs_of(says, Questions("pairs", items), mean, seed), items, seed)
    known = {name: entry["auroc"] for name, entry in judged["uncertainties"].items()}
    return {
        "validation_accuracy": judged["accuracy"], "validation_accuracy_interval": judged["accuracy_interval"],
        "length_accuracy": judged["length_accuracy"], "validation_nll": judged["probability"]["nll"],
        "auroc_wrong_order": {name: value for name, value in known.items() if math.isfinite(value)},
        "reliability": judged["probability"]["bins"],
    }  # fmt: skip
