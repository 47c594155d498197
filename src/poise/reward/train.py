"""`poise train-reward`: preferences in; a conventional reward model and three multi-head ones out.

    RUN/single      stage 1: one point head, Bradley-Terry: the conventional reward model
    RUN/ensemble    K Bradley-Terry heads, each fitted to a bootstrap of the preferences (arXiv 2310.02743)
    RUN/posterior   K point heads drawn from the Laplace posterior of stage 1; their spread grows with the distance
                    from the preferences, that of the BRME heads hardly does
    RUN/brme        stage 2: K Gaussian heads fitted to the standardized stage-1 reward (arXiv 2409.15360), the
                    Bayesian Reward Model Ensemble
    RUN/validator   with --validator-share: one point head on another depth of the language model, from pairs that the
                    others do not see

A run reads the preferences (pairs.py), makes the trunk (trunk_training.py), fits the heads (head_training.py) and
judges them on the validation pairs (quality.py). All models share one trunk, the first layers of the language model: as
it is, or tuned in stage 1 (RUN/trunk, and RUN/adapter for LoRA). The trunk's features are computed once and kept in the
feature cache. The validator is made before them, in the same way and on a trunk of its own.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.data.evaluation_sets import Item, Questions
from poise.data.in_memory import called
from poise.data.preferences import read_preferences
from poise.data.types import Preference
from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.models.chat_format import encode_conversation
from poise.models.context import context_length
from poise.models.head_adapters import apart
from poise.models.loading import (
    HfModel,
    HfTokenizer,
    device,
    found_here,
    frozen_dtype,
    load_tokenizer,
    resolve_model,
)
from poise.models.model_config import load_config
from poise.models.prompt_trials import padded_or_raise, takes_packed_rows
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model, with_heads
from poise.models.row_check import row_check
from poise.models.run_heads import VALIDATOR, VALIDATOR_TRAINING
from poise.models.scorer import FeatureExtractor, Scorer
from poise.reward.config import Config, Stage2Trunk
from poise.reward.head_training import (
    HeadTraining,
    TrainedModel,
    calibrated,
    single_on_features,
    train_on_features,
)
from poise.reward.heads import std_collapsed
from poise.reward.pairs import FeaturePairs, PreferenceSplit, pair_features, told_apart
from poise.reward.quality import TextScores, judge_pairs, pairs_of
from poise.reward.trunk_training import (
    Loss,
    TrunkTraining,
    fine_tune,
    fresh_head,
    gaussian_loss,
    heads_loss,
    preference_loss,
    token_pairs,
)
from poise.runtime.distributed import join, launched_processes, refuse_sharding, spread_by_launcher
from poise.runtime.folders import refuse_deleted
from poise.runtime.progress import console
from poise.runtime.run_folder import Inputs, Json, Run, is_main_process

_MEASURED = 500  # pairs whose answers' lengths are taken

__all__ = ["Config", "heads_in_memory", "pair_features", "run", "trunk_source"]


def run(config: Config) -> Run:
    """Train, evaluate and save; a finished run is returned as it is."""
    config = config.for_command()
    config.check()
    launched_processes()  # refuses an environment in which no process would save
    if config.shard:
        _meet()
    out = Run(Path(config.output))
    out.check_config(config, lambda: _inputs(config, found_here))
    if out.results is not None:
        out.refuse_edited(lambda: _inputs(config, found_here))
        _clear(out.folder)  # what a process that was killed right after the results has left
        return out
    split, held_back = read(config)  # what is wrong with the data comes before the folder
    watching = _for_validator(config) if held_back else config
    out = Run.open(config.output, config, lambda: _inputs(config))
    # First, so that a folder that holds a reward model holds its validator; and its trunk is out of memory by then.
    validator = _train_validator(watching, out.folder, held_back) if held_back else None
    console.print(f"reward model: {split}")
    extract = make_trunk(config, out.folder, split)
    trained, held_features = fit_heads(config, out.folder, split, extract)
    judged = judge(trained.models, held_features, split, config.seed)
    _save(out, split, extract, trained, judged, validator)
    return out


def _meet() -> None:
    """Meet the other processes before a model is loaded. PoiseError if accelerate was asked to shard as well."""
    refuse_sharding("--shard is Poise's own; launch with accelerate_configs/ddp.yaml or by torchrun")
    join()


def _inputs(config: Config, place: Callable[[str], str] = resolve_model) -> Inputs:
    """What the run reads, by the setting that names it; preferences from the hub are not compared.

    place: where a model is.
    """
    return {"--preferences": [Path(config.preferences)], "--model": [Path(place(config.model))]}


def heads_in_memory(config: Config, extract: FeatureExtractor) -> dict[str, TrainedModel]:
    """The reward models of a config with a frozen trunk, by name, without writing a run.

    extract: of that trunk, which several configs may share.
    """
    config.check()
    if config.trunk != "frozen" or config.stage2_trunk != "frozen" or config.validator_share:
        raise PoiseError("reward models with a trunk of their own are trained as runs")
    split, _ = read(config)
    return train_on_features(config, split, extract, pair_features(extract, split.preferences)).models


def read(config: Config) -> tuple[PreferenceSplit, PreferenceSplit | None]:
    """The preferences, split into training and validation: the reward models', and with --validator-share its own.

    The two share no prompt, or no text, as the two sides of each do not. Rows that the model's template refuses are bad
    rows; pairs whose two texts the model reads as one are left out.
    """
    share, seed = config.validation_share, config.seed
    tokenizer = load_tokenizer(resolve_model(config.model))
    preferences = read_preferences(config.preferences, config.on_bad_row, row_check(tokenizer))
    context = context_length(load_config(resolve_model(config.model)).get_text_config())
    longest = min(config.max_length or context, context)
    preferences = told_apart(preferences, tokenizer, longest, called(config.preferences))
    if config.shards == "source" and not any(one.source for one in preferences):
        raise PoiseError(
            f"--shards source: no row of {called(config.preferences)} names its `source`; choose other --shards"
        )
    if not config.validator_share:
        return PreferenceSplit.draw(preferences, share, seed), None
    try:
        parts = PreferenceSplit.draw(preferences, config.validator_share, seed)
        return PreferenceSplit.draw(parts.fit_on, share, seed), PreferenceSplit.draw(parts.held_out, share, seed)
    except PoiseError as error:
        raise PoiseError(
            f"--validator-share {config.validator_share:g} of {called(config.preferences)}: {error}"
        ) from None


# ---- the validator ----


def _for_validator(config: Config) -> Config:
    """The settings of the validator's training: those of the reward models on another depth of the language model.

    Twice their layers where it has so many, else half of them: features that share fewer of their errors. PoiseError
    for a model of one layer.
    """
    depth = load_config(resolve_model(config.model)).get_text_config().num_hidden_layers
    layers = config.num_layers or depth
    if layers > depth:
        raise PoiseError(f"{config.model} has {depth} layers, --num-layers asks for {layers}")
    if depth == 1:
        raise PoiseError(f"--validator-share: {config.model} has one layer, and a validator reads another depth")
    return replace(config, num_layers=2 * layers if 2 * layers <= depth else layers // 2)


def _train_validator(config: Config, folder: Path, split: PreferenceSplit) -> Json:
    """Train and save FOLDER/validator; returns what results.json says of it: as of the reward models.

    config: of `_for_validator`. Its trunk is trained in FOLDER/validator-training, from where a killed run goes on.
    """
    console.print(f"validator of {config.num_layers} layer{'s' * (config.num_layers > 1)}: {split}")
    extract = make_trunk(config, folder / VALIDATOR_TRAINING, split)
    raw = pair_features(extract, split.preferences)
    model = single_on_features(config, split, extract, raw)
    judged = judge({VALIDATOR: model}, {VALIDATOR: raw.rows(split.validation)}, split, config.seed)
    if is_main_process():
        classifier, tokenizer = extract.classifier, extract.tokenizer
        save_reward_model(folder / VALIDATOR, classifier, tokenizer, model.weight, model.layout)
    return _about(split, extract, judged)


# ---- the trunk ----


def make_trunk(config: Config, folder: Path, split: PreferenceSplit) -> FeatureExtractor:
    """The trunk whose features the heads read: the model's own, or FOLDER/trunk, which stage 1 tunes on the split."""
    if config.trunk == "frozen" or (folder / "trunk").exists():
        classifier, tokenizer = _load_trunk(config, folder)
    else:
        # Weights that are trained need more digits than bfloat16 has, also where it does the arithmetic.
        classifier, tokenizer = load_trunk(config.model, config.num_layers, dtype=torch.float32, place=_place(config))
        fresh_head(classifier, config.seed)
        extract = FeatureExtractor(classifier, tokenizer, config.max_length)
        loss = preference_loss(config.label_smoothing)
        classifier = _tune(config, config.trunk, extract, split.fit_on, loss, folder)
        if is_main_process():
            head = classifier.score.weight.data
            save_reward_model(folder / "trunk", classifier, tokenizer, head, HeadLayout(1, "point", (0.0,)))
    return _extractor(config, classifier, tokenizer)


def _extractor(config: Config, classifier: HfModel, tokenizer: HfTokenizer) -> FeatureExtractor:
    classifier = classifier.to(device=device(), dtype=frozen_dtype())
    return FeatureExtractor(classifier, tokenizer, config.max_length, cached=config.feature_cache)


def _place(config: Config) -> torch.device | None:
    """Where weights that will be spread are loaded: a GPU need not hold all of them."""
    return torch.device("cpu") if config.shard or spread_by_launcher() else None


def trunk_source(config: Config, folder: Path) -> tuple[str, int]:
    """(model, layers of it to keep) that stage 1 leaves a run in `folder` with, as `load_trunk` takes them."""
    return (config.model, config.num_layers) if config.trunk == "frozen" else (str(folder / "trunk"), 0)


def _load_trunk(config: Config, folder: Path, **how: Any) -> tuple[HfModel, HfTokenizer]:
    """What stage 1 left, by `load_trunk`; of a trunk that it trained a PoiseError says how to have it again."""
    source, layers = trunk_source(config, folder)
    try:
        return load_trunk(source, layers, **how)
    except PoiseError as error:
        again = "" if config.trunk == "frozen" else f"; delete {source} and start again: it is trained anew"
        raise PoiseError(f"{error}{again}") from None


def _tune(
    config: Config,
    kind: Stage2Trunk,
    extract: FeatureExtractor,
    preferences: list[Preference],
    loss: Loss,
    folder: Path,
    **targets_and_mask: Tensor,
) -> HfModel:
    """The classifier of `extract`, trained; `targets_N2` and `mask_NK` as `token_pairs` takes them."""
    classifier, packed = extract.classifier, takes_packed_rows(extract.classifier)
    if not packed:
        padded_or_raise(classifier)
    pairs = token_pairs(extract, preferences, share=packed, **targets_and_mask)
    names = TrunkTraining.__dataclass_fields__.keys() - {"kind"}
    how = TrunkTraining(kind=kind, **{name: getattr(config, name) for name in names})
    return fine_tune(classifier, extract.tokenizer.pad_token_id, pairs, loss, how, folder, packed=packed)


# ---- the heads ----


def fit_heads(
    config: Config, folder: Path, split: PreferenceSplit, extract: FeatureExtractor
) -> tuple[HeadTraining, dict[str, FeaturePairs]]:
    """(the reward models, features of the validation pairs as each model's trunk gives them)."""
    raw = pair_features(extract, split.preferences)
    trained = train_on_features(config, split, extract, raw)
    held_features = dict.fromkeys(trained.models, raw.rows(split.validation))
    if config.stage2_trunk != "frozen":
        brme = _tune_brme(config, folder, trained, split)
        held_features["brme"] = pair_features(brme.extract, split.held_out)
        scale = trained.models["single"].layout.reward_scale
        trained.models["brme"] = calibrated(brme, held_features["brme"], trained.targets, scale, config.head_loss)
    return trained, held_features


def _tune_brme(config: Config, folder: Path, trained: HeadTraining, split: PreferenceSplit) -> TrainedModel:
    """Stage 2 with the trunk: from the heads on frozen features, toward the same targets. Not yet calibrated.

    With an adapter for each head, from copies of the single head, and on the preferences.
    """
    per_head = config.stage2_trunk == "lora_per_head"
    start = trained.models["brme"]
    classifier, tokenizer = _load_trunk(config, folder, dtype=torch.float32, place=_place(config))
    with_heads(classifier, start.weight)
    extract = FeatureExtractor(classifier, tokenizer, config.max_length)
    point = config.head_loss == "bradley_terry"
    loss = heads_loss(start.layout, config.label_smoothing) if point else gaussian_loss(start.layout, config.head_loss)
    classifier = _tune(
        config, config.stage2_trunk, extract, split.fit_on, loss,
        folder / "stage2", targets_N2=trained.targets.fit_T.view(2, -1).T, mask_NK=trained.shards.fit_NK,
    )  # fmt: skip
    weight, layout = classifier.score.weight.data.float().cpu(), start.layout
    if per_head:
        weight, layout = apart(weight, layout.num_heads), replace(layout, adapters=True)
    extract = _extractor(config, classifier, tokenizer)
    return start._replace(weight=weight, layout=layout, extract=extract, reference=None)  # its features are others now


# ---- evaluation on held-out preferences ----


def judge(
    models: dict[str, TrainedModel], held_features: dict[str, FeaturePairs], split: PreferenceSplit, seed: int
) -> Json:
    """Results by model on the validation pairs.

    Those pairs chose the prior and when to stop; `poise evaluate-reward` judges on others.
    """
    return {
        name: {
            "num_heads": model.layout.num_heads,
            **_judge_one(
                Scorer(model.extract, model.weight, model.layout, model.last_layer), held_features[name],
                split.held_out, seed,
            ),
        }
        for name, model in models.items()
    }  # fmt: skip


def _judge_one(scorer: Scorer, held: FeaturePairs, preferences: list[Preference], seed: int) -> Json:
    asked = Questions.of("pairs", [Item(p.prompt, (p.chosen,), (p.rejected,)) for p in preferences])
    alternating = torch.stack([held.chosen_NH, held.rejected_NH], 1).flatten(0, 1)
    scores = TextScores.of(scorer.decode(alternating.float()), scorer.layout, scorer.last_layer, alternating)
    judged = judge_pairs(pairs_of(scores, asked, mean, seed), asked, seed)
    known = {name: entry["auroc"] for name, entry in judged["uncertainties"].items()}
    return {
        "validation_accuracy": judged["accuracy"], "validation_accuracy_interval": judged["accuracy_interval"],
        "length_accuracy": judged["length_accuracy"], "validation_nll": judged["probability"]["nll"],
        "auroc_wrong_order": {name: value for name, value in known.items() if value is not None},
        "reliability": judged["probability"]["bins"],
    }  # fmt: skip


# ---- the run folder ----


def _lengths(tokenizer: HfTokenizer, preferences: list[Preference]) -> Json:
    """Tokens of the answers people chose, of every so many pairs: what a policy's completions should have room for."""
    some = preferences[:: max(len(preferences) // _MEASURED, 1)]
    lengths = np.array([len(encode_conversation(tokenizer, one.prompt, one.chosen)[1]) for one in some])
    return {"median": int(np.median(lengths)), "p90": int(np.ceil(np.quantile(lengths, 0.9)))}


def _about(split: PreferenceSplit, extract: FeatureExtractor, judged: Json) -> Json:
    """What the results say of models: their pairs, their trunk, and how they do on the validation pairs."""
    return {
        "num_preferences": len(split.preferences), "num_train": len(split.train),
        "num_validation": len(split.validation),
        "split": dict(zip(("unit", "num_train", "num_validation"), (split.unit, *split.num_units), strict=True)),
        "num_truncated": extract.num_truncated, "num_layers": extract.classifier.config.num_hidden_layers,
        "models": judged,
    }  # fmt: skip


def _save(
    out: Run, split: PreferenceSplit, extract: FeatureExtractor, trained: HeadTraining, judged: Json,
    validator: Json | None,
) -> None:  # fmt: skip
    """Write every model, then the results; then delete what only a run that is not finished needs."""
    collapsed = std_collapsed(trained.history)
    if extract.num_truncated:
        console.print(f"{extract.num_truncated} samples lost their oldest tokens (longer than {extract.max_length})")
    if collapsed:
        console.print(
            "std collapse: the heads' std fell more than 10x while validation error stood still; "
            "do not read it as an error bar"
        )
    if not is_main_process():
        return
    refuse_deleted(out.folder)
    for name, (weight, layout, last_layer, trunk, reference) in trained.models.items():
        save_reward_model(out.folder / name, trunk.classifier, trunk.tokenizer, weight, layout, last_layer, reference)
    out.finish(
        {
            **_about(split, extract, judged),
            "chosen_tokens": _lengths(extract.tokenizer, split.preferences),
            "prior_precision": trained.precision, "stage1_reward_std": trained.models["single"].layout.reward_scale,
            "stage2_history": trained.history, "std_collapsed": collapsed,
            **({"validator": validator} if validator else {}),
        }
    )  # fmt: skip
    _clear(out.folder)


def _clear(folder: Path) -> None:
    """Delete the checkpoints of trunks that are finished, and the validator's trunk, which its own folder holds."""
    if is_main_process():
        for name in ("trainer", "stage2/trainer", f"{VALIDATOR_TRAINING}/trainer", f"{VALIDATOR_TRAINING}/trunk"):
            shutil.rmtree(folder / name, ignore_errors=True)
