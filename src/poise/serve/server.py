"""`poise serve`: reward models over HTTP, until SIGTERM or Ctrl-C.

A stop answers every request that was accepted, refuses new ones, and exits with status 0.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from poise.errors import PoiseError
from poise.models.scale_file import ScaleFile
from poise.runtime.progress import console
from poise.runtime.settings import bounds
from poise.serve import vllm
from poise.serve.app import Limits, make_app
from poise.serve.backend import RewardModels, local, validator
from poise.serve.config import ServeConfig as Config
from poise.serve.metrics import Metrics
from poise.serve.rewards import Rewards

# Seconds that an idle connection stays open: longer than proxies and pools of connections keep theirs (nginx 60,
# aiohttp 15). Whoever closes first loses the request that the other one is just sending.
KEEP_ALIVE = 75
BACKLOG = 2048  # uvicorn's own


def run(config: Config) -> None:
    """Serve until told to stop."""
    config.check()
    token = config.token()
    for option in ("scale", "log"):
        if path := getattr(config, option):
            _may_write(Path(path), option)
    with _listening(config) as place:
        rewards = rewards_of(config, vllm.remote(config) if config.backend == "vllm" else local(config))
        limits = Limits(config.max_body * 2**20, config.max_completions, config.max_characters)
        app = make_app(rewards, Metrics(config.log), limits, token)
        settings = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )  # fmt: skip
        host, port = place.getsockname()[:2]
        place.listen(BACKLOG)  # whoever waits for the line may ask at once
        heads, host = rewards.models.layout.num_heads, f"[{host}]" if ":" in host else host
        console.print(
            f"{heads} head{'s' * (heads > 1)}, {config.objective}: http://{host}:{port}",
            markup=False,
            soft_wrap=True,
        )
        with _stopped_by_signals():
            uvicorn.Server(settings).run([place])
        rewards.batcher.close()


def rewards_of(config: Config, models: RewardModels) -> Rewards:
    """The reward that the settings describe, of loaded reward models."""
    file = None
    if config.scale:
        within = bounds(config.reward_floor, config.reward_ceiling)
        file = ScaleFile(Path(config.scale), config.objective, models.fingerprint, models.layout.num_heads, *within)
    return Rewards(models, config.objective, file, config.scale_count, config.max_queue, validator(config))


def _may_write(path: Path, option: str) -> None:
    """Raise PoiseError now, rather than once requests come, if a file cannot be made. A scale that is there is read."""
    if path.exists() and option == "scale":
        return
    if path.is_dir():
        raise PoiseError(f"--{option} {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PoiseError(f"--{option} {path} cannot be written")


@contextlib.contextmanager
def _listening(config: Config) -> Iterator[socket.socket]:
    """The socket, bound before the model is loaded: a port that is taken must not cost a minute."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((config.host, config.port))
        except OSError as error:
            raise PoiseError(f"cannot listen at {config.host}:{config.port}: {error.strerror or error}") from None
        yield place


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn ends at SIGTERM and SIGINT and then raises them again, for whoever handled them before: nobody here."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
