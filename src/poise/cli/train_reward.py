"""`poise train-reward`: trains, then writes a model card into every checkpoint."""

from poise.reports import reward_card
from poise.reward import train
from poise.runtime.run_folder import Run, config_dict, is_main_process

Config = train.Config


def run(config: Config) -> Run:
    """Train, evaluate and save, then write the cards; weights are not touched."""
    out = train.run(config)
    for name in reward_card.WHAT:
        if is_main_process() and (out.folder / name / "config.json").exists():
            reward_card.write_card(out, config_dict(config), name)
    return out
