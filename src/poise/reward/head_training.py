"""The head stage of `poise train-reward`: from trunk features to four reward models, without another forward pass.

Shapes: _H hidden.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from poise.functional.typicality import Reference, fit_reference
from poise.models.reward_model import HeadLayout, LastLayer
from poise.models.scorer import FeatureExtractor
from poise.reward.config import PAIR_LOSSES, Config
from poise.reward.heads import (
    HeadLossName,
    Heads,
    Targets,
    choose_prior,
    draw_posterior,
    fit_ensemble,
    fit_reward_scale,
    fit_std_scale,
    posterior_factor,
    train_heads,
)
from poise.reward.pairs import FeaturePairs, PreferenceSplit
from poise.reward.shards import Shards, make_shards
from poise.runtime.run_folder import Json


class TrainedModel(NamedTuple):
    """A reward model to be saved: heads on the features of a trunk."""

    weight: Tensor
    layout: HeadLayout
    last_layer: LastLayer | None
    extract: FeatureExtractor
    reference: Reference | None = None


class HeadTraining(NamedTuple):
    """The reward models, by name, and how their training went.

    precision: of the prior of stage 1. shards, targets: of stage 2. history: validation error of stage 2.
    """

    models: dict[str, TrainedModel]
    precision: float
    shards: Shards
    targets: Targets
    history: list[Json]


class _Stage1(NamedTuple):
    """The Bradley-Terry head. fit, held: pairs in standardized features: (raw - center) / scale.

    weight_H: of the head on them, with a prior of `precision`; std: of its rewards over the training texts. single: the
    same head, its rewards of mean 0 and std 1 there.
    """

    fit: FeaturePairs
    held: FeaturePairs
    center: Tensor
    scale: Tensor
    precision: float
    weight_H: Tensor
    std: Tensor
    single: Heads


def _stage1(config: Config, split: PreferenceSplit, raw: FeaturePairs) -> _Stage1:
    train = raw.rows(split.train).texts_NH
    center, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    pairs = raw.standardized(center, scale)
    fit, held = pairs.rows(split.train), pairs.rows(split.validation)
    precision, weight_H = choose_prior(fit, held, config.label_smoothing)
    rewards = fit.texts_NH @ weight_H
    middle, std = rewards.mean(), rewards.std().clamp_min(1e-12)
    single = Heads((weight_H / std).unsqueeze(0), (middle / std).unsqueeze(0), "point")
    return _Stage1(fit, held, center, scale, precision, weight_H, std, single)


def single_on_features(
    config: Config, split: PreferenceSplit, extract: FeatureExtractor, raw: FeaturePairs
) -> TrainedModel:
    """The head of stage 1 alone, as `train_on_features` fits it."""
    found = _stage1(config, split, raw)
    weight, layout = found.single.on_raw_features(found.center, found.scale, found.std.item())
    return TrainedModel(weight, layout, None, extract)


def train_on_features(
    config: Config, split: PreferenceSplit, extract: FeatureExtractor, raw: FeaturePairs
) -> HeadTraining:
    """Fit the head of stage 1, its posterior, its ensemble and the heads of stage 2.

    raw: features of all pairs of `split`, as `extract` gives them.
    """
    fit, held, center, scale, precision, weight_H, std, single = _stage1(config, split, raw)
    sources = ([p.source for p in rows] for rows in (split.fit_on, split.held_out))
    shards = make_shards(config.shards, fit, held, config.num_heads, split.generator, *sources)
    targets = Targets.of(single, fit, held)
    heads, history = {"single": single}, list[Json]()
    if config.stage2_trunk != "lora_per_head":  # whose heads start from the single one
        heads["brme"], history = train_heads(
            fit, held, targets, shards, split.generator, loss_name=config.head_loss, num_steps=config.head_steps,
            learning_rate=config.head_lr, initial_std=single.weight_LH.std().item(),
        )  # fmt: skip
    factor = posterior_factor(fit, weight_H, precision)
    draws = draw_posterior(weight_H, factor, config.posterior_heads, split.generator) / std
    heads["posterior"] = Heads(draws, single.offset_L.expand(len(draws)), "point")
    members = fit_ensemble(fit, precision, config.num_heads, split.generator, config.label_smoothing) / std
    heads["ensemble"] = Heads(members, (fit.texts_NH @ members.T).mean(0), "point")
    # A draw moves a reward by (F z).x. For raw features, in units of the standardized reward, F becomes
    # F / (scale std).
    last_layers = {"posterior": LastLayer(factor / scale.unsqueeze(-1) / std, center)}
    reference = fit_reference(raw.rows(split.train).texts_NH)
    models: dict[str, TrainedModel] = {}
    for name in ("single", "ensemble", "posterior", "brme"):
        if name in heads:
            weight, layout = heads[name].on_raw_features(center, scale, std.item())
            models[name] = TrainedModel(weight, layout, last_layers.get(name), extract, reference)
    if "brme" in models:
        models["brme"] = calibrated(models["brme"], raw.rows(split.validation), targets, std.item(), config.head_loss)
    else:
        models["brme"] = copies_of(models["single"], config.num_heads, config.head_loss)
    return HeadTraining(models, precision, shards, targets, history)


def copies_of(single: TrainedModel, num_heads: int, head_loss: HeadLossName) -> TrainedModel:
    """K heads that are all the single head: where adapters of single heads start.

    In units in which their loss gives the preferences the probabilities that the single head gives them. For
    `bradley_terry`, point heads: means times reward_scale. For `probit_pairs`, Gaussian heads of std
    floor + softplus(0) everywhere: Phi(x) is about sigmoid(1.702 x), so means times
    reward_scale sqrt(1 + 2 std^2) / 1.702.
    Heads fitted to the pairs themselves would be a worse start: linear ones fit a few hundred pairs without an error,
    and leave the adapters nothing to learn.
    """
    scale = single.layout.reward_scale
    if head_loss == "bradley_terry":
        layout = HeadLayout(num_heads, "point", (single.layout.offset[0] * scale,) * num_heads)
        return single._replace(weight=torch.cat([single.weight * scale] * num_heads), layout=layout)
    flat = HeadLayout(num_heads, "gaussian", (0.0,) * (2 * num_heads))
    std = flat.decode(torch.zeros(2 * num_heads)).std[0].item()
    scale *= (1 + 2 * std**2) ** 0.5 / 1.702
    weight = torch.cat([single.weight * scale] * num_heads + [torch.zeros_like(single.weight)] * num_heads)
    offset = (single.layout.offset[0] * scale,) * num_heads + (0.0,) * num_heads
    return single._replace(weight=weight, layout=replace(flat, offset=offset))


def calibrated(
    model: TrainedModel, held: FeaturePairs, targets: Targets, stage1_scale: float, head_loss: HeadLossName
) -> TrainedModel:
    """The model with the scale that makes each head's std an error bar for the validation targets.

    held: features of the validation pairs, as the model's trunk gives them. stage1_scale: reward_scale of the targets.
    Heads of `probit_pairs` and `bradley_terry` do not imitate the stage-1 reward: their unit is that of their loss, and
    each has its own constant. Their `reward_scale` is fitted on validation pairs. For stds, the targets are put in that
    unit, without constants.
    """
    layout = model.layout
    heads = layout.decode(held.texts_NH @ model.weight.double().T)
    mean, target = heads.mean, targets.held_T
    if head_loss in PAIR_LOSSES:
        chosen, rejected = mean.mean(-1).chunk(2)
        reward_scale = fit_reward_scale(chosen - rejected)
        target = target * (stage1_scale / reward_scale)
        mean = mean + (target.unsqueeze(-1) - mean).median(0).values
        layout = replace(layout, reward_scale=reward_scale)
    if layout.kind == "point":
        return model._replace(layout=layout)
    std_scale = tuple(fit_std_scale(mean, heads.std, target).tolist())
    return model._replace(layout=replace(layout, std_scale=std_scale))
