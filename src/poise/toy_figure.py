"""`poise toy` with its figure: RUN/toy.png beside the tables."""

from poise import plots, toy
from poise.runs import Run

Config = toy.Config


def run(config: Config) -> Run:
    """The study, then its figure."""
    out = toy.run(config)
    plots.save_toy(out.results or {}, out.folder / "toy.png")
    return out
