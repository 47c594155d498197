"""`poise toy` with its figure: RUN/toy.png beside the tables."""

from poise.reports import study_plots
from poise.runtime.run_folder import Run
from poise.toy import study as toy

Config = toy.Config


def run(config: Config) -> Run:
    """The study, then its figure."""
    out = toy.run(config)
    study_plots.save_toy(out.results or {}, out.folder / "toy.png")
    return out
