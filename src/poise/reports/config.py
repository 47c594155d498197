"""The settings of `poise report`."""

from dataclasses import dataclass

import tyro

from poise.runtime.settings import Settings


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write the page of run folders: of any command that makes one, finished or not; several make one page."""

    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs/quickstart",)
    """Run folders, e.g. runs/reward, or runs/policy runs/policy-2. Default: runs/quickstart."""
    output: str = ""
    """File to write. Default: report.html in the run folder; of several runs, in the folder that the first is in."""
    png: str = ""
    """Also write the first figure of a quickstart to this PNG file."""
