"""The settings of `poise report`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from poise.errors import PoiseError
from poise.runtime.run_kinds import kind_of
from poise.runtime.settings import Settings

_DEFAULT = ("runs/quickstart",)


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write the page of run folders: of any command that makes one, finished or not; several make one page."""

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN …]")] = _DEFAULT
    """Run folders, e.g. runs/reward, or runs/policy runs/policy-2. Default: runs/quickstart."""
    output: str = ""
    """File to write. Default: report.html in the run folder; of several runs, in the folder that the first is in."""
    png: str = ""
    """Also write the first figure of a quickstart to this PNG file."""

    def check(self) -> None:
        """As for every command; and every folder is a run."""
        super().check()
        if not self.folders:
            raise PoiseError("name a run folder: poise report RUN")
        for folder in self.folders:
            try:
                kind_of(folder)
            except PoiseError as error:
                hint = "; name a run folder: poise report RUN" if self.folders == _DEFAULT else ""
                raise PoiseError(f"{error}{hint}") from None
