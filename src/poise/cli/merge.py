"""`poise merge`: the adapters folded, then the policy's card on the merged model."""

from pathlib import Path

from poise.policy import merge
from poise.reports import policy_card

Config = merge.Config


def run(config: Config) -> Path:
    """Fold, then write the card."""
    target = merge.run(config)
    policy_card.write_merged_card(Path(config.policy), target)
    return target
