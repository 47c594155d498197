"""The settings of `poise report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from poise.errors import PoiseError
from poise.runtime.run_kinds import kind_of
from poise.runtime.settings import EachOnce, Settings

_DEFAULT = ("runs/quickstart",)


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write the page of run folders: of any command that makes one, finished or not; several make one page."""

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], EachOnce(), tyro.conf.arg(metavar="RUN [RUN …]")] = (
        _DEFAULT
    )
    """Run folders, e.g. runs/reward, or runs/policy runs/policy-2. Default: runs/quickstart."""
    output: str = ""
    """File to write. Default: report.html in the run folder; of several runs, in the folder that the first is in."""
    png: str = ""
    """Also write the first figure of a quickstart to this PNG file."""

    def check(self) -> None:
        """As for every command; every folder is a run; and no file but an earlier page or figure is replaced."""
        super().check()
        if not self.folders:
            raise PoiseError("name a run folder: poise report RUN")
        if self.png and Path(self.png).suffix.lower() != ".png":
            raise PoiseError(f"--png {self.png} must end in .png")
        for option, path, begins in (("--output", self.output, b"<!doctype html"), ("--png", self.png, b"\x89PNG")):
            if path and Path(path).exists():
                own = Path(path).is_file() and Path(path).read_bytes()[:64].lstrip().lower().startswith(begins.lower())
                if not own:
                    raise PoiseError(f"{option} {path} exists and is no earlier one; choose another name")
        for folder in self.folders:
            try:
                kind_of(folder)
            except PoiseError as error:
                hint = "; name a run folder: poise report RUN" if self.folders == _DEFAULT else ""
                raise PoiseError(f"{error}{hint}") from None
        if self.png and [kind_of(folder) for folder in self.folders] != ["quickstart"]:
            raise PoiseError(
                "--png is of one quickstart: its first figure; leave it out, or name a quickstart's folder"
            )
