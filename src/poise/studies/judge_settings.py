"""Who judges comparisons: the settings that `poise choose` and `poise trust` share."""

from dataclasses import dataclass, replace
from typing import TypeVar

from poise.errors import PoiseError
from poise.runtime.settings import Settings, check_address

S = TypeVar("S", bound="JudgeSettings")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Settings):
    """Where judgments come from, if nobody writes them into the file."""

    page: bool = False
    """Judge on a page of this machine (its address is printed); every answer is saved at once."""
    judge: str = ""
    """Let a chat model judge instead: the address of a server of OpenAI's chat completions, e.g.
    http://127.0.0.1:8000/v1 of vLLM. It reads every comparison in both orders; where its answers differ, that is a
    tie. A key, if it needs one, comes from POISE_JUDGE_KEY."""
    judge_model: str = ""
    """Name of the judge's model; default: the one that its server has."""

    def check(self) -> None:
        """As `Settings.check`, and that there is one judge, with an address."""
        super().check()
        if self.page and self.judge:
            raise PoiseError("--page and --judge are two judges; choose one")
        if self.judge_model and not self.judge:
            raise PoiseError("--judge-model needs the address of its server, --judge")
        if self.judge:
            check_address("--judge", self.judge)


def without_judge(config: S) -> S:
    """The settings as a run folder keeps them: who judges may change from call to call."""
    return replace(config, page=False, judge="", judge_model="")
