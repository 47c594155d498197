"""`poise ensemble`: several reward models, of one trunk or of many, as one: their heads side by side on one scale."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from poise.data.preferences import OnBadRow, read_preferences
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models.loading import resolve_model
from poise.models.reward_model import checkpoint_folder
from poise.models.scorer import ENSEMBLE_FILE, Ensemble
from poise.runtime.folders import is_leftover
from poise.runtime.progress import console, progress


@dataclass(frozen=True)
class Config:
    """Combine reward models, the members, into a folder that every command reads as one with all their heads."""

    members: tyro.conf.Positional[tuple[str, ...]]
    """Reward models: checkpoint folders, hub ids or `poise train-reward` runs."""
    reference: str
    """Preferences. Each member's reward is scaled to mean 0 and std 1 over their texts, so that none dominates."""
    output: str = "runs/ensemble"
    """Folder to write."""
    max_length: int = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""


def run(config: Config) -> Path:
    """Normalize and save; returns the folder. The members stay where they are."""
    if len(config.members) < 2:
        raise PoiseError("an ensemble needs at least two reward models")
    folder = Path(config.output)
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)} if folder.is_dir() else set()
    if names - {ENSEMBLE_FILE} or (folder.exists() and not folder.is_dir()):
        raise PoiseError(f"--output {folder} exists and is no earlier ensemble; choose another folder or delete it")
    preferences = read_preferences(config.reference, config.on_bad_row)
    reference = [Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    with progress("ensemble: reference texts", len(reference)) as advance:
        ensemble = Ensemble.fit(config.members, reference, config.max_length, advance)
    folders = [resolve_model(checkpoint_folder(member)) for member in config.members]
    ensemble.save(folder, [os.path.relpath(member, folder) for member in folders])
    console.print(f"{ensemble.layout.num_heads} heads of {len(config.members)} reward models: {folder}")
    return folder
