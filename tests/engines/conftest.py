"""Tests with other projects' engines, each in its own environment: `make test-engines`. `make test` leaves them out.

All of them ask one `poise serve` about the same conversations.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines_kit import CONVERSATIONS, Reference, Server, Wire

collect_ignore_glob = [] if os.environ.get("POISE_ENGINES") else ["*"]


@pytest.fixture(scope="session")
def brme(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model) / "brme")


@pytest.fixture(scope="session")
def server(brme: str) -> Iterator[Server]:
    server = Server(brme)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def wire(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Adapters find it in POISE_URL."""
    from poise.serve.client import own_client

    wire = Wire(server)
    monkeypatch.setenv("POISE_URL", wire.url)
    own_client.cache_clear()
    yield wire
    wire.close()
    own_client.cache_clear()


@pytest.fixture(scope="session")
def reference(brme: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`Scorer` = `poise score` = `poise serve`."""
    from poise.cli.main import main
    from poise.data.types import Sample
    from poise.functional.objectives import tradeoff
    from poise.models.scorer import Scorer
    from poise.serve.client import Client

    folder = tmp_path_factory.mktemp("reference")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in CONVERSATIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["score", brme, str(folder / "rows.jsonl"), "--output", str(folder / "scores.jsonl")])
    by_command = [json.loads(line)["reward"] for line in (folder / "scores.jsonl").read_text().splitlines()]
    by_scorer = tradeoff(Scorer.load(brme)([Sample(*pair) for pair in CONVERSATIONS]), 0.4).tolist()
    by_server = [Client(server.url).score(prompt, [text])[0]["reward"] for prompt, text in CONVERSATIONS]
    first = Reference(by_scorer, 0.0)
    assert max(by_scorer) - min(by_scorer) > 0.01  # equal rewards would show nothing
    return Reference(by_scorer, max(first.difference_to(by_command), first.difference_to(by_server)))
