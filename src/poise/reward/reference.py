"""`poise reference`: gives a reward model the texts that the objective `typical` measures distances from."""

import json
from dataclasses import asdict
from pathlib import Path

from poise.data.preferences import read_preferences, read_samples
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.typicality import fit_reference
from poise.models.formats import local_checkpoint
from poise.models.reward_model import load_reward_model, save_reference
from poise.models.row_check import row_check
from poise.models.scorer import FeatureExtractor
from poise.reward.config import ReferenceConfig as Config
from poise.runtime.folders import write_file_atomic
from poise.runtime.progress import console, progress


def run(config: Config) -> Path:
    """Fit the reference on the texts' features and write it into the checkpoint; returns its folder.

    The file comes first: a checkpoint speaks of its reference only once it is there.
    """
    config.check()
    folder = local_checkpoint(config.reward)
    classifier, tokenizer, layout = load_reward_model(str(folder))
    if layout.adapters:
        raise PoiseError(f"{config.reward} has heads with adapters of their own, which share no features to measure")
    extract = FeatureExtractor(classifier, tokenizer, config.max_length, cached=config.feature_cache)
    check = row_check(tokenizer)
    if config.preferences:
        pairs = read_preferences(config.preferences, config.on_bad_row, check)
        samples = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    else:
        samples = [one for one in read_samples(config.completions, config.on_bad_row, check) if one.completion.strip()]
    with progress("reference: trunk features", len(samples)) as advance:
        reference = fit_reference(extract(samples, advance))
    save_reference(folder, reference)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["poise"] = asdict(layout.with_reference(reference))
    with write_file_atomic(folder / "config.json") as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if extract.num_truncated:
        console.print(f"{extract.num_truncated} texts lost their oldest tokens (longer than {extract.max_length})")
    console.print(f"{reference.num_texts} reference texts, shrinkage {reference.shrinkage:.2f}: {folder}", markup=False)
    return folder
