"""The settings of `poise serve`; torch is not imported to read them."""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from poise.errors import PoiseError
from poise.functional.objective_names import read_objective
from poise.models.formats import checkpoint_folder
from poise.models.run_heads import refuse_itself
from poise.runtime.settings import (
    Bounded,
    Count,
    EachOnce,
    LengthOrAll,
    Preferences,
    Reward,
    Settings,
    at_least,
    between,
    bounds,
    check_address,
)
from poise.serve.client import TOKEN_VARIABLE

_LONGEST_ROW = 1 << 24  # bytes of a log's row that are looked at
_COUPLED = {"expected_tradeoff", "expected_worst_case"}


@dataclass(frozen=True)
class ServeConfig(Settings):
    """Serve reward models to training engines over HTTP."""

    rewards: Annotated[
        tyro.conf.Positional[tuple[Reward, ...]],
        EachOnce(checkpoint_folder),
        tyro.conf.arg(metavar="REWARD [REWARD …]"),
    ] = ()
    """The rewards: checkpoint folders, hub ids, `poise train-reward` runs or an ensemble. Several act as one."""
    backend: Literal["local", "vllm"] = "local"
    """Who reads the texts: this process, or vLLM servers of the same checkpoint, at `--url`."""
    url: tuple[str, ...] = ()
    """Addresses of the vLLM servers, all of one reward model, e.g. http://127.0.0.1:8000."""
    objective: str = "tradeoff(0.4)"
    """How the heads become one reward, e.g. nominal, worst_case, tradeoff(0.4), lower_confidence(1)."""
    validator: Reward | None = ""
    """Another reward model, of other pairs or other features, that is only watched: /metrics shows its reward, and how
    much of what the reward gained it sees (`poise_transfer`). It changes no reward. Default: with `--backend local` the
    one that the reward's run trained (`poise train-reward --validator-share`), if it did; None: none."""
    reference: Preferences = ""
    """Preferences, needed for several reward models: each one's reward is scaled to mean 0 and std 1 over their texts,
    as in `poise ensemble`."""
    scale: str = ""
    """JSON file with the zero and the unit of the reward. Read where it exists; otherwise fitted to the first
    `--scale-count` completions and written there. Replicas share one file. Empty: as `poise score` gives them."""
    scale_count: Annotated[int, at_least(2)] = 64
    """Different completions of the initial policy that a new scale is fitted to. Answers wait until all are there."""
    reward_ceiling: Bounded | None = None
    """The most that a reward can be, in stds of the initial policy's rewards; needs `--scale`. 2 is what `poise
    train-policy` takes. Default: no bound."""
    reward_floor: Bounded | None = None
    """The least that a reward can be, likewise."""
    host: str = "127.0.0.1"
    """Address to listen at. Anything but loopback needs a token."""
    port: Annotated[int, between(0, 65535)] = 8400
    """Port to listen at; 0 takes a free one."""
    token_file: str = ""
    """File with the bearer token that every request must carry; the environment variable POISE_TOKEN does the same."""
    log: str = ""
    """JSON lines file to add every scored completion to, with all heads."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""
    max_body: Count = 8
    """Largest request, in MiB."""
    max_completions: Count = 1024
    """Most completions in one request."""
    max_characters: Count = 2**21
    """Longest prompt or completion, in characters."""
    max_queue: Count = 8192
    """Completions that may wait; beyond them requests are answered with 429 and told to come again."""

    READ_WITH = MappingProxyType(
        {
            "reference": (lambda one: len(one.rewards) > 1, "several reward models"),
            "scale_count": (lambda one: one.scale, "--scale"),
        }
    )

    def check(self) -> None:
        """As `Settings.check`, the objective, the reference of several reward models, and the token."""
        super().check()
        name, _ = read_objective(self.objective)
        if name in _COUPLED:
            raise PoiseError(
                f"objective {name} depends on which completions are scored together, and a server cannot know that; "
                f"take tradeoff or worst_case"
            )
        bounds(self.reward_floor, self.reward_ceiling)
        if not self.scale and (self.reward_floor, self.reward_ceiling) != (None, None):
            raise PoiseError(
                "--reward-ceiling and --reward-floor are in stds of the initial policy's rewards; give --scale, the "
                "file that keeps those"
            )
        if not self.rewards:
            raise PoiseError("name at least one reward model to serve")
        if len(self.rewards) > 1 and not self.reference:
            raise PoiseError(
                "several reward models need --reference, the preferences over which their scales are made equal; or "
                "serve one folder that `poise ensemble` wrote"
            )
        if (self.backend == "vllm") != bool(self.url):
            raise PoiseError("--backend vllm and --url go together")
        if self.backend == "vllm" and len(self.rewards) > 1:
            raise PoiseError("--backend vllm reads one reward model; several need --backend local")
        if self.validator and len(self.rewards) == 1:
            refuse_itself(self.validator, self.rewards[0])
        for url in self.url:
            check_address("--url", url)
        if self.log:
            _refuse_other_log(Path(self.log))
        if not self.token() and not is_loopback(self.host):
            raise PoiseError(
                f"--host {self.host} is reachable from other machines: set a token in {TOKEN_VARIABLE} or --token-file"
            )

    def token(self) -> str:
        """The bearer token; "" for none. Raises PoiseError for a file that cannot be read or is empty."""
        if not self.token_file:
            return os.environ.get(TOKEN_VARIABLE, "").strip()
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise PoiseError(f"--token-file {self.token_file} cannot be read: {type(error).__name__}") from None
        if not token:
            raise PoiseError(f"--token-file {self.token_file} is empty")
        if not re.fullmatch(r"[!-~]+", token):
            raise PoiseError(
                f"--token-file {self.token_file} holds more than one word of ASCII, which no request can carry"
            )
        return token


def _refuse_other_log(path: Path) -> None:
    """Raise PoiseError for a file that holds something else than the rows of a log: they would be added to it."""
    if path.is_dir():
        raise PoiseError(f"--log {path} is a folder; name a file")
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        first = file.readline(_LONGEST_ROW)
    if not first.startswith(b'{"time": ') or b'"mean": ' not in first:  # others, such as a run's samples, have it too
        raise PoiseError(f"--log {path} exists and holds no log of `poise serve`; choose another name")


def is_loopback(host: str) -> bool:
    """Is this an address that only the same machine reaches?

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
