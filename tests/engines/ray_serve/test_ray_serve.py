"""Ray Serve on a local Ray: two replicas with the rewards of `poise serve`."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve

from engines_kit import CONVERSATIONS, ROOT, Reference, remember
from poise.errors import PoiseError
from poise.integrations.ray_serve import Replica, app
from poise.serve.client import Client


@pytest.fixture(scope="module")
def url(brme: str) -> Iterator[str]:
    variables = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app({"rewards": brme, "num_replicas": "2"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.timeout(400)
def test_replicas_have_the_servers_rewards(url: str, reference: Reference) -> None:
    client = Client(url)  # it checks that each answer carries its request's hash

    def ask(number: int) -> float:
        prompt, answer = CONVERSATIONS[number % len(CONVERSATIONS)]
        return float(client.score(prompt, [answer])[0]["reward"])

    with ThreadPoolExecutor(64) as callers:
        rewards = list(callers.map(ask, range(64 * len(CONVERSATIONS))))
    differences = [
        reference.difference_to(rewards[i : i + len(CONVERSATIONS)]) for i in range(0, len(rewards), len(CONVERSATIONS))
    ]
    remember("ray", [], part="Ray Serve", largest_difference=max(differences), replicas=2, callers=64)


def test_errors_are_the_servers(url: str) -> None:
    with pytest.raises(PoiseError, match="422 a query must begin with its prompt"):
        Client(url).post("/get_reward", {"query": ["a"], "prompts": ["b"]})


def test_callers_on_other_machines_need_a_token(brme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POISE_TOKEN", raising=False)
    replica = Replica({"rewards": (brme,)})
    for client in (SimpleNamespace(host="10.0.0.2"), None):
        answer = asyncio.run(replica(SimpleNamespace(client=client)))
        assert answer.status_code == 401
        assert b"set POISE_TOKEN" in answer.body


def test_paths_are_those_of_the_folder_it_is_called_in(brme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas run in the folder that Ray was started in."""
    run = Path(brme).parent
    monkeypatch.chdir(run)
    (options,) = app({"rewards": "brme,org/model", "reference": "brme", "scale": "new"})._bound_deployment.init_args
    assert options["rewards"] == (brme, "org/model")
    assert (options["reference"], options["scale"]) == (brme, str(run / "new"))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "name at least one reward model"),
        ({"rewards": "a", "num_replicas": "many"}, "many"),
        ({"rewards": "a", "port": "8400"}, "port is no option"),
        ({"rewards": "a", "reward_ceiling": "2"}, "give --scale"),
        ({"rewards": "a", "scale": "s", "reward_ceiling": "high"}, "high"),
    ],
)
def test_what_cannot_be_served_is_one_line(given: dict[str, str], line: str) -> None:
    with pytest.raises(PoiseError, match=line) as error:
        app(given)
    assert "\n" not in str(error.value)
