"""`poise train-policy`: the training, then a model card beside the policy."""

import contextlib
from pathlib import Path

from poise.policy import train
from poise.policy.config import unread_settings
from poise.reports import live, policy_card
from poise.runtime.run_folder import Run, config_dict, is_main_process

Config = train.Config


def run(config: Config) -> Run:
    """Train, with a page that is written anew meanwhile; then write the card; weights are not touched."""
    with live.refreshed(Path(config.output)) if is_main_process() else contextlib.nullcontext():
        out = train.run(config)
    if is_main_process() and (out.folder / "policy").exists():
        policy_card.write_card(out, config_dict(config), unread_settings(config.algorithm))
    return out
