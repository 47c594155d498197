"""`poise train-reward`: trains, then writes a model card into every checkpoint."""

from poise.reports import reward_card
from poise.reward import train
from poise.runtime.run_folder import Run, config_dict, is_main_process

Config = train.Config


def run(config: Config) -> Run:
    """Train, evaluate and save, then write the cards; weights are not touched."""
    out = train.run(config)
    if is_main_process():
        reward_card.write_cards(out, config_dict(config))
    return out
