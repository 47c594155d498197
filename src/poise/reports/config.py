"""The settings of `poise report`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from poise.errors import PoiseError
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

    def check(self) -> None:
        """As `Settings.check`, and that no file but an earlier page or figure is replaced."""
        super().check()
        if self.png and Path(self.png).suffix.lower() != ".png":
            raise PoiseError(f"--png {self.png} must end in .png")
        for option, path, begins in (("--output", self.output, b"<!doctype html"), ("--png", self.png, b"\x89PNG")):
            if path and Path(path).exists():
                own = Path(path).is_file() and Path(path).read_bytes()[:64].lstrip().lower().startswith(begins.lower())
                if not own:
                    raise PoiseError(f"{option} {path} exists and is no earlier one; choose another name")
