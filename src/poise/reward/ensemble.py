"""`poise ensemble`: several reward models, of one trunk or of many, as one: their heads side by side on one scale."""

import os
from pathlib import Path

from poise.data.preferences import read_preferences
from poise.data.types import Sample
from poise.models.formats import checkpoint_folder
from poise.models.loading import resolve_model
from poise.models.scorer import Ensemble
from poise.reward.config import EnsembleConfig as Config
from poise.runtime.progress import console, progress


def run(config: Config) -> Path:
    """Normalize and save; returns the folder. The members stay where they are."""
    config.check()
    folder = Path(config.output)
    preferences = read_preferences(config.reference, config.on_bad_row)
    reference = [Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    with progress("ensemble: reference texts", len(reference)) as advance:
        ensemble = Ensemble.fit(config.members, reference, config.max_length, advance)
    folders = [resolve_model(checkpoint_folder(member)) for member in config.members]
    ensemble.save(folder, [os.path.relpath(member, folder) for member in folders])
    console.print(f"{ensemble.layout.num_heads} heads of {len(config.members)} reward models: {folder}")
    return folder
