"""The settings of `poise report`."""

from dataclasses import dataclass

import tyro

from poise.runtime.settings import Settings


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Rebuild the page of a quickstart folder."""

    folder: tyro.conf.Positional[str] = "runs/quickstart"
    """A finished `poise quickstart`."""
    png: str = ""
    """Also write the first figure to this PNG file."""
