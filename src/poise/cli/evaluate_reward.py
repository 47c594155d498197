"""`poise evaluate-reward`: evaluates, then writes the page."""

from poise.reports import reward_page
from poise.reward import evaluate
from poise.runtime.run_folder import Run

Config = evaluate.Config


def run(config: Config) -> Run:
    """Judge, then write the page."""
    out = evaluate.run(config)
    reward_page.build(out.folder)
    return out
