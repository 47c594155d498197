"""`poise serve` on a Ray cluster, by Ray Serve: replicas, autoscaling, health and restarts are Ray's.

    serve run poise.integrations.ray_serve:app rewards=runs/reward scale=/shared/scale.json num_replicas=4 num_gpus=1

The endpoints and answers are those of `poise serve`. Replicas share a scale through its file, on a disk that all see.
"""

from pathlib import Path
from typing import Any, NoReturn

from ray import serve

from poise.errors import PoiseError
from poise.serve.app import Limits, denied, make_app, respond
from poise.serve.backend import local
from poise.serve.config import ServeConfig, is_loopback
from poise.serve.metrics import Metrics
from poise.serve.server import rewards_of

ONGOING = 256  # requests in one replica: Ray's default of 5 would be the largest batch
_NUMBERS = {"scale_count": int, "max_length": int, "reward_ceiling": float, "reward_floor": float}
_TEXTS = ("objective", "scale", "reference")


class Replica:
    """One process with the reward models. Its app batches what arrives at about the same time."""

    def __init__(self, options: dict[str, Any]):
        config = ServeConfig(**options)
        config.check()
        self._token = config.token()
        limits = Limits(config.max_body * 2**20, config.max_completions, config.max_characters)
        self._app = make_app(rewards_of(config, local(config)), Metrics(), limits, self._token)

    async def __call__(self, request: Any) -> Any:
        """The answer to a request. Without a token, only callers on the same machine get one."""
        if not self._token and not (request.client and is_loopback(request.client.host)):
            return denied("callers on other machines need a token: set POISE_TOKEN where the replicas run")
        return await respond(self._app, request)


def app(given: dict[str, Any]) -> Any:
    """The application for `serve run` and config files.

    given: rewards (folders or hub ids, with commas between), and objective, scale, scale_count, reward_ceiling,
    reward_floor, reference, max_length as for `poise serve`; num_replicas (a number, or auto) and num_gpus of each.
    Paths are of the folder that this is called in: replicas run in the one that Ray was started in.
    Raises PoiseError for another name or a value that is none.
    """
    rest = dict(given)
    # No validator: each replica would compare with the start of its own life, not with that of the training.
    names = filter(None, str(rest.pop("rewards", "")).split(","))
    options: dict[str, Any] = {"rewards": tuple(map(_from_here, names)), "validator": None}
    options |= {name: str(rest.pop(name)) for name in _TEXTS if name in rest}
    if options.get("scale"):
        options["scale"] = str(Path(options["scale"]).absolute())
    if "reference" in options:
        options["reference"] = _from_here(options["reference"])
    replicas, gpus = str(rest.pop("num_replicas", 1)), rest.pop("num_gpus", 0)
    try:
        options |= {name: number(rest.pop(name)) for name, number in _NUMBERS.items() if name in rest}
        actor = {"num_gpus": float(gpus)}
        count: Any = replicas if replicas == "auto" else int(replicas)
    except ValueError as error:
        _refuse(str(error))
    if rest:
        _refuse(f"{', '.join(sorted(rest))} is no option; there are rewards, {', '.join((*_TEXTS, *_NUMBERS))}, "
                f"num_replicas, num_gpus")  # fmt: skip
    ServeConfig(**options).check()
    placed = serve.deployment(Replica).options(
        num_replicas=count, ray_actor_options=actor, max_ongoing_requests=ONGOING
    )
    return placed.bind(options)


def _from_here(name: str) -> str:
    """The whole path of what lies here; another name, such as a hub id, as it is."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _refuse(line: str) -> NoReturn:
    raise PoiseError(f"ray_serve: {line}")
