"""What other engines' real code sent, recorded by tests/engines, gets the scorer's rewards."""

import asyncio
import json
from pathlib import Path

import pytest

from asgi import post
from engines_kit import CONVERSATIONS, place
from poise.data.types import Sample
from poise.functional.objectives import tradeoff
from poise.models.scorer import Scorer
from poise.serve.app import make_app
from poise.serve.backend import of_scorer
from poise.serve.metrics import Metrics
from poise.serve.rewards import Rewards

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_requests_of_real_engines_get_the_scorers_rewards(path: Path, scorer: Scorer) -> None:
    calls = json.loads(path.read_text(encoding="utf-8"))["calls"]
    assert [place(call["request"]) for call in calls] == list(range(len(CONVERSATIONS)))
    expected = tradeoff(scorer([Sample(*pair) for pair in CONVERSATIONS]), 0.4).tolist()
    app = make_app(Rewards(of_scorer(scorer, ""), "tradeoff(0.4)"), Metrics())

    async def answers() -> list[dict[str, object]]:
        return [(await post(app, call["path"], call["request"])).json for call in calls]

    for call, answer, reward in zip(calls, asyncio.run(answers()), expected, strict=True):
        assert sorted(answer) >= call["answer"]  # what the engine's code found there
        first = {"/score": lambda a: a["scores"][0]["reward"], "/get_reward": lambda a: a["rewards"][0]}
        assert first.get(call["path"], lambda a: a["reward"])(answer) == pytest.approx(reward, abs=1e-5)


def test_every_recorded_engine_is_there() -> None:
    assert {path.stem for path in RECORDED} >= {"miles", "ms-swift", "openrlhf", "skyrl-gym", "slime", "verl"}
