"""The server without a socket: rewards equal to the scorer's, and one line for everything that is wrong."""

import asyncio
import base64
import hashlib
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asgi import Answer, call, post
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import RewardScale, disagreement, parse_objective, tradeoff, typical
from poise.integrations.trl_reward import RobustReward
from poise.models.chat_format import generation_prompt
from poise.models.reward_model import heads_fingerprint
from poise.models.scale_file import ScaleFile
from poise.models.scorer import Ensemble, Scorer
from poise.serve import app as application
from poise.serve import rewards as rewarding
from poise.serve.app import Limits, make_app
from poise.serve.backend import of_scorer, validator
from poise.serve.config import ServeConfig
from poise.serve.metrics import Metrics
from poise.serve.rewards import Rewards
from poise.serve.server import rewards_of

OBJECTIVE = "tradeoff(0.4)"
ROW = {
    "reward": 0.0, "nominal": 0.0, "worst_case": 0.0, "gap": 0.0, "disagreement": 0.1, "routing_std": 0.1,
    "total_std": 0.1, "nominal_head": 0, "mean": [0.0], "std": [0.1], "truncated": False,
}  # fmt: skip
SAMPLES = [
    Sample(f"Review the {thing}.", f"A {word} {thing}.") for thing in ("film", "pan") for word in ("good", "bad")
]


def serve(
    scorer: Scorer, scenario: Callable[[Any, Rewards], Awaitable[Any]], log: str = "", token: str = "", **options: Any
) -> Any:
    """Run a scenario against an application of its own."""

    async def run() -> Any:
        rewards = Rewards(of_scorer(scorer, "heads"), OBJECTIVE, **options)
        result = await scenario(make_app(rewards, Metrics(log), Limits(2**20, 64, 2**18), token), rewards)
        rewards.batcher.close()
        return result

    return asyncio.run(run())


def asked(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt, "completion": sample.completion}


# ---- rewards ----


def test_every_form_has_the_scorers_rewards(scorer: Scorer) -> None:
    heads = scorer(SAMPLES)
    expected = tradeoff(heads, 0.4)
    tokenizer = scorer.extract.tokenizer

    async def scenario(app: Any, _: Rewards) -> list[Any]:
        rendered = [generation_prompt(tokenizer, sample.prompt) for sample in SAMPLES]
        turns = [
            [{"role": "user", "content": s.prompt}, {"role": "assistant", "content": s.completion}] for s in SAMPLES
        ]
        parts = [[{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in t] for t in turns]
        found = [
            [(await post(app, "/score", asked(s))).json["scores"][0]["reward"] for s in SAMPLES],
            [(await post(app, "/score", {"messages": t})).json["scores"][0]["reward"] for t in turns],
            [(await post(app, "/score", {"messages": t})).json["scores"][0]["reward"] for t in parts],
            [
                (await post(app, "/score", {"text": tokenizer.apply_chat_template(t, tokenize=False)})).json["scores"][
                    0
                ]["reward"]
                for t in turns
            ],
            [
                (
                    await post(app, "/remote_rm", {"prompt": r, "response": f"{s.completion}<|im_end|>", "label": "x"})
                ).json["reward"]
                for r, s in zip(rendered, SAMPLES, strict=True)
            ],
            (
                await post(
                    app,
                    "/get_reward",
                    {
                        "query": [f"{r}{s.completion}" for r, s in zip(rendered, SAMPLES, strict=True)],
                        "prompts": rendered,
                        "labels": [None] * 4,
                    },
                )
            ).json["rewards"],
        ]
        group = await post(
            app, "/score", {"prompt": SAMPLES[0].prompt, "completions": [s.completion for s in SAMPLES[:2]]}
        )
        return [*found, group.json["scores"]]

    *forms, group = serve(scorer, scenario)
    for rewards in forms:
        torch.testing.assert_close(torch.tensor(rewards), expected, rtol=0, atol=1e-5)
    for i, row in enumerate(group):
        torch.testing.assert_close(torch.tensor(row["mean"]), heads.mean[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(row["std"]), heads.std[i], rtol=0, atol=1e-5)
        assert row["disagreement"] == pytest.approx(disagreement(heads)[i].item(), abs=1e-5)
        assert row["gap"] == pytest.approx(row["nominal"] - row["worst_case"], abs=1e-6)
        assert row["nominal_head"] == heads.std[i].argmin()
        assert row["truncated"] is False


def test_typical_is_served_with_the_scorers_distances(scorer: Scorer) -> None:
    """And what a metrics page says of them; an ensemble, and a reward model without a reference, serve none."""
    heads = scorer(SAMPLES)
    assert heads.distance is not None

    async def scenario(app: Any, rewards: Rewards) -> tuple[list[Any], str]:
        rewards._combine = parse_objective("typical(0.5)")
        scores = [(await post(app, "/score", asked(sample))).json["scores"][0] for sample in SAMPLES]
        return scores, (await call(app, "/metrics")).body.decode()

    scores, page = serve(scorer, scenario)
    torch.testing.assert_close(torch.tensor([row["distance"] for row in scores]), heads.distance[:, 0])
    torch.testing.assert_close(torch.tensor([row["reward"] for row in scores]), typical(heads, 0.5), rtol=0, atol=1e-5)
    assert "poise_distance_count 4.0" in page
    without = Scorer(scorer.extract, scorer.weight, scorer.layout)
    for other in (without, Ensemble([scorer] * 2, [0.0] * 2, [1.0] * 2)):
        row = serve(other, lambda app, _: post(app, "/score", asked(SAMPLES[0]))).json["scores"][0]
        assert "distance" not in row
        layout = without.layout.with_reference(None) if other is without else other.layout
        with pytest.raises(PoiseError, match="reference"):
            layout.check_objective("typical(0.5)")


@pytest.mark.parametrize(
    "objective", ["reliable(2)", "typical(0.5)", "worst_case", "lower_confidence(1)", "soft_min(1)"]
)
def test_an_objective_is_one_reward_in_trl_and_on_the_server(scorer: Scorer, objective: str) -> None:
    """On one scale: that of TRL's first call."""
    trl = RobustReward.of(scorer, objective)
    rewards = trl([sample.prompt for sample in SAMPLES], [sample.completion for sample in SAMPLES])
    assert trl.fitted is not None
    scale = trl.fitted

    async def scenario(app: Any, serving: Rewards) -> list[float]:
        serving._scale, serving._combine = scale, parse_objective(objective)
        answers = [await post(app, "/score", asked(sample)) for sample in SAMPLES]
        return [answer.json["scores"][0]["reward"] for answer in answers]

    assert serve(scorer, scenario) == pytest.approx(rewards, abs=1e-4)
    assert torch.tensor(rewards).std() > 0.1


def test_a_validator_is_told_of_and_changes_nothing(scorer: Scorer) -> None:
    """It reads what the reward reads; a sample that it refuses has a reward all the same."""
    other = Scorer(scorer.extract, scorer.weight.flip(0) * 2, scorer.layout)
    watched = of_scorer(other, "other")

    async def scenario(app: Any, _: Rewards) -> list[Any]:
        return [(await post(app, "/score", asked(sample))).json["scores"][0] for sample in SAMPLES]

    alone, seen = serve(scorer, scenario), serve(scorer, scenario, validator=watched)
    assert [row["validator"] for row in seen] == pytest.approx(other(SAMPLES).mean.mean(-1).tolist(), abs=1e-5)
    assert [{k: v for k, v in row.items() if k != "validator"} for row in seen] == alone

    def refused(_: Sample) -> Any:
        raise PoiseError("no")

    watched.encode = refused  # type: ignore[method-assign]
    assert serve(scorer, scenario, validator=watched) == alone


def test_the_validator_of_the_reward_s_run_is_served_by_the_process_that_reads_it(
    watched_reward: Path, scorer: Scorer, capsys: pytest.CaptureFixture[str]
) -> None:
    own, run = f"{watched_reward}/validator", str(watched_reward)
    for rewards in ((run,), (f"{run}/single",)):
        found = validator(ServeConfig(rewards))
        assert found is not None
        assert found.fingerprint == heads_fingerprint(own)
        assert f"validator: {own}, trained with" in capsys.readouterr().err
    assert validator(ServeConfig((run,), validator=None)) is None
    assert validator(ServeConfig((run, f"{run}/single"), reference="p.jsonl")) is None
    assert capsys.readouterr().err == ""
    assert validator(ServeConfig((run,), backend="vllm", url=("http://a",))) is None
    assert capsys.readouterr().err == f"no validator is watched; --validator {own} does, in this process\n"
    other = validator(ServeConfig((run,), validator=f"{run}/single"))
    assert other is not None
    assert other.fingerprint == heads_fingerprint(f"{run}/single")
    with pytest.raises(PoiseError, match="is the reward model itself"):
        ServeConfig((run,), validator=f"{run}/brme").check()
    watching = rewards_of(ServeConfig((run,)), of_scorer(scorer, "heads"))
    assert watching._validator is not None
    watching.batcher.close()


def test_transfer_is_the_validators_gain_over_the_rewards() -> None:
    metrics = Metrics()

    def transfer(reward: float, validator: float, each: int = 1) -> float:
        """After 256 completions, so many of each prompt, whose stds are 1 and 2."""
        rows = [
            {**ROW, "reward": reward + (-1) ** i, "validator": validator + 2 * (-1) ** i} for i in range(256)
        ]  # fmt: skip
        samples = [Sample(f"prompt {i // each}", f"a text {i}") for i in range(256)]
        metrics.scored("/score", "x", samples, rows)
        return float(
            next(x for x in metrics.page().decode().splitlines() if x.startswith("poise_transfer ")).split()[1]
        )

    assert math.isnan(transfer(0.5, 3.0))  # the start
    assert transfer(2.5, 5.0) == pytest.approx(1 / 2)
    assert transfer(4.5, 3.0) == 0.0
    assert math.isnan(transfer(0.55, 9.0))  # a gain of .05 is noise
    assert transfer(0.7, 4.0) == pytest.approx(0.5 / 0.2)  # one of .2 is not, of 256 prompts
    assert math.isnan(transfer(0.7, 4.0, each=8))  # of 32 prompts it is: completions of one are alike


def test_callers_at_once_are_one_batch_and_get_their_own_answers(scorer: Scorer) -> None:
    samples = [Sample(f"Review number {i % 4}.", f"It is a good one, {i}.") for i in range(64)]
    expected = tradeoff(scorer(samples), 0.4).tolist()

    async def scenario(app: Any, rewards: Rewards) -> tuple[list[Answer], list[int]]:
        answers = await asyncio.gather(*(post(app, "/score", asked(sample)) for sample in samples))
        return answers, rewards.batch_sizes

    answers, sizes = serve(scorer, scenario)
    assert sizes == [64]
    for sample, answer, reward in zip(samples, answers, expected, strict=True):
        hashed = hashlib.sha256(json.dumps(asked(sample)).encode()).hexdigest()
        assert answer.json["request"] == answer.headers["x-poise-request"] == hashed
        assert answer.json["scores"][0]["reward"] == pytest.approx(reward, abs=1e-5)


def test_openrlhf_gets_scalars_in_its_logs(scorer: Scorer) -> None:
    async def scenario(app: Any, _: Rewards) -> Answer:
        return await post(app, "/get_reward", {"query": ["Hi there. Good."], "prompts": ["Hi there."], "labels": ["x"]})

    answer = serve(scorer, scenario).json
    assert answer["rewards"] == answer["scores"]
    assert len(answer["rewards"]) == 1
    assert {"head_0", "head_std_0", "gap", "disagreement"} <= answer["extra_logs"].keys()
    assert all(type(value) is float for value in answer["extra_logs"].values())


def test_several_reward_models_are_one_ensemble(brme: str) -> None:
    other = str(Path(brme).parent / "brme")
    ensemble = Ensemble.fit([brme, other], SAMPLES)

    async def scenario(app: Any, _: Rewards) -> Answer:
        return await post(app, "/score", asked(SAMPLES[0]))

    row = serve(ensemble, scenario).json["scores"][0]
    expected = ensemble(SAMPLES[:1])
    torch.testing.assert_close(torch.tensor(row["mean"]), expected.mean[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(row["std"]), expected.std[0], rtol=0, atol=1e-5)
    assert len(of_scorer(ensemble, "").backends) == 1  # equal trunks read once


# ---- the scale ----


def scale_file(folder: Path, scorer: Scorer) -> ScaleFile:
    return ScaleFile(folder / "scale.json", OBJECTIVE, "heads", scorer.layout.num_heads)


def test_the_first_completions_give_the_scale_and_replicas_share_it(scorer: Scorer, tmp_path: Path) -> None:
    samples = [Sample("Review a film.", f"A good film, {i}.") for i in range(8)]
    heads = scorer(samples)
    expected = RewardScale.fit(heads, lambda h: tradeoff(h, 0.4))

    async def together(app: Any, rewards: Rewards) -> list[float]:
        answers = await asyncio.gather(*(post(app, "/score", asked(sample)) for sample in samples))
        assert rewards.ready
        return [answer.json["scores"][0]["reward"] for answer in answers]

    file = scale_file(tmp_path, scorer)
    first = serve(scorer, together, scale_file=file, scale_count=8)
    torch.testing.assert_close(torch.tensor(first), expected.combine(heads, lambda h: tradeoff(h, 0.4)))
    assert abs(sum(first)) < 1e-3
    assert (saved := file.read()) is not None
    assert saved.count == 8
    # another replica, and one that is started again, read it
    assert serve(scorer, together, scale_file=file, scale_count=100) == pytest.approx(first, abs=1e-6)
    with pytest.raises(PoiseError, match="another reward model"):
        ScaleFile(file.path, OBJECTIVE, "others", scorer.layout.num_heads).read()


def test_a_bounded_reward_never_passes_its_bounds_and_its_file_keeps_them(scorer: Scorer, tmp_path: Path) -> None:
    samples = [Sample("Review a film.", f"A good film, {i}.") for i in range(8)]
    plain, bounded = (
        ScaleFile(tmp_path / name, OBJECTIVE, "heads", scorer.layout.num_heads, *bounds)
        for name, bounds in (("plain", ()), ("bounded", (-0.5, 0.25)))
    )

    async def together(app: Any, _: Rewards) -> list[float]:
        answers = await asyncio.gather(*(post(app, "/score", asked(sample)) for sample in samples))
        return [answer.json["scores"][0]["reward"] for answer in answers]

    free = serve(scorer, together, scale_file=plain, scale_count=8)
    found = serve(scorer, together, scale_file=bounded, scale_count=8)
    assert min(free) < -0.5
    assert max(free) > 0.25
    assert found == pytest.approx([min(max(reward, -0.5), 0.25) for reward in free], abs=1e-6)
    assert (saved := bounded.read()) is not None
    assert (saved.floor, saved.ceiling) == (-0.5, 0.25)
    with pytest.raises(PoiseError, match=r"from -0\.5 to 0\.25, not of"):
        replace(bounded, ceiling=2.0).read()  # a restart with another bound


def test_too_few_completions_are_told_to_come_again(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewarding, "HOLD", 0.05)

    async def scenario(app: Any, rewards: Rewards) -> list[Answer]:
        early = [await post(app, "/score", asked(SAMPLES[0])) for _ in range(3)]  # the same one counts once
        assert not rewards.ready
        return [*early, await post(app, "/score", {"prompt": "Hi.", "completions": ["a", "b", "c"]})]

    *early, last = serve(scorer, scenario, scale_file=scale_file(tmp_path, scorer), scale_count=4)
    assert [answer.status for answer in early] == [503] * 3
    assert "1 are here" in early[-1].json["error"]
    assert early[0].headers["retry-after"] == "1"
    assert last.status == 200


@pytest.mark.parametrize(("num", "away", "status"), [(5, 30.0, 200), (3, 30.0, 503), (5, 0.0, 503)])
def test_callers_that_cannot_ask_for_more_at_once_have_a_scale_of_what_they_asked_for(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num: int,
    away: float, status: int,
) -> None:  # fmt: skip
    """SkyRL asks with 32 threads, which all waited for 64 texts, and gave up. Not with fewer than FEWEST, nor for one
    who comes by now and then."""
    for name, value in {"HOLD": 0.02, "STALL": 0.3, "FEWEST": 4, "_AWAY": away}.items():
        monkeypatch.setattr(rewarding, name, value)
    samples = [Sample("Review a film.", f"A good film, {i}.") for i in range(num)]

    async def scenario(app: Any, _: Rewards) -> list[list[int]]:
        return [
            [answer.status for answer in await asyncio.gather(*(post(app, "/score", asked(one)) for one in samples))]
            for _ in range(20)
        ]

    file = scale_file(tmp_path, scorer)
    first, *_, last = serve(scorer, scenario, scale_file=file, scale_count=64)
    assert first == [503] * num
    assert last == [status] * num
    said = "the scale is fitted to 5 completions, not 64"
    assert (said in capsys.readouterr().err) == (file.read() is not None) == (status == 200)


def test_the_first_file_wins(scorer: Scorer, tmp_path: Path) -> None:
    file = scale_file(tmp_path, scorer)
    ones, twos = (RewardScale((0.0,) * scorer.layout.num_heads, 0.0, std, count=2) for std in (1.0, 2.0))
    assert file.keep(ones) == ones
    assert file.keep(twos) == ones


# ---- what is wrong ----


def test_paths_with_a_slash_and_roles_by_other_names_are_the_usual_ones(scorer: Scorer) -> None:
    async def scenario(app: Any, _: Rewards) -> list[Answer]:
        turns = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "x"}]
        usual = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]
        zipped = await call(app, "/score", b"x", headers={"content-encoding": "gzip"})

        async def mounted(scope: dict[str, Any], receive: Any, send: Any) -> None:  # as under Ray Serve's route_prefix
            await app({**scope, "root_path": "/base", "path": f"/base{scope['path']}"}, receive, send)

        found = [await post(app, path, {"messages": turns}) for path in ("/score", "/score/")]
        return [
            await post(app, "/score", {"messages": usual}),
            *found,
            await post(mounted, "/score", {"messages": usual}),
            zipped,
        ]

    *found, zipped = serve(scorer, scenario)
    assert [answer.json["scores"] for answer in found] == [found[0].json["scores"]] * 4
    assert (zipped.status, zipped.json["error"]) == (415, "a body in the coding 'gzip'; send it as it is")


DEEP = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"\xff\xfe", 400), (DEEP, 400), (b'{"prompt": "\\ud800", "completion": "x"}', 400),
        (b"[]", 422), (b"null", 422), (b"{}", 422), (b'{"prompt": 1, "completion": "x"}', 422),
        (b'{"prompt": "x"}', 422), (b'{"completion": "x"}', 422), (b'{"prompt": "x", "completions": []}', 422),
        (b'{"prompt": [], "completion": "x"}', 422), (b'{"messages": []}', 422),
        (b'{"messages": [{"role": "user", "content": "x"}]}', 422), (b'{"text": "x"}', 422),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}', 422),
        (
            b'{"messages": [{"role": "user", "content": "x"},'
            b' {"role": "assistant", "content": "x", "thinking": "y"}]}', 422,
        ),
        (b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "x"}', 422),
        (b'{"prompt": "x", "completion": "x", "system": "y"}', 422),
        (json.dumps({"prompt": "x", "completions": ["x"] * 65}).encode(), 422),
        (json.dumps({"prompt": "x" * 2**19, "completion": "x"}).encode(), 422), (b"x" * (2**20 + 1), 413),
    ],
)  # fmt: skip
def test_what_is_no_request_is_one_line(scorer: Scorer, body: bytes, status: int) -> None:
    async def scenario(app: Any, _: Rewards) -> tuple[Answer, Answer]:
        return await call(app, "/score", body), await post(app, "/score", asked(SAMPLES[0]))

    answer, after = serve(scorer, scenario)
    assert answer.status == status
    assert set(answer.json) == {"error"}
    assert 0 < len(answer.json["error"]) < 400
    assert "\n" not in answer.json["error"]
    assert after.status == 200


def test_a_refused_sample_does_not_harm_its_batch(scorer: Scorer) -> None:
    tokenizer = scorer.extract.tokenizer
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}" + own
    try:

        async def scenario(app: Any, _: Rewards) -> list[Answer]:
            bad = post(app, "/score", {"prompt": "no", "completion": "x"})
            return await asyncio.gather(*(post(app, "/score", asked(s)) for s in SAMPLES), bad)

        *good, bad = serve(scorer, scenario)
    finally:
        tokenizer.chat_template = own
    assert [answer.status for answer in good] == [200] * 4
    assert bad.status == 422
    assert "never" in bad.json["error"]


def test_no_number_is_made_of_nan(scorer: Scorer) -> None:
    async def scenario(app: Any, rewards: Rewards) -> list[Answer]:
        whole = rewards.models.backends[0]

        def broken(tokens: Any) -> Any:
            read = whole(tokens)
            read.logits[0, 0] = float("nan")
            return read

        rewards.models.backends[0] = broken
        one = await post(app, "/score", asked(SAMPLES[0]))
        rewards.models.backends[0] = lambda _: 1 / 0
        return [one, await post(app, "/get_reward", {"query": ["Hi. x"], "prompts": ["Hi."]})]

    for answer in serve(scorer, scenario):
        assert answer.status == 500
        assert set(answer.json) == {"error"}


def test_slow_and_broken_off_bodies_are_refused(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "BODY_SECONDS", 0.1)
    body = json.dumps(asked(SAMPLES[0])).encode()

    async def scenario(app: Any, _: Rewards) -> list[int]:
        slow = await call(app, "/score", parts=[body[:5], 5.0, body[5:]])
        gone = await call(app, "/score", parts=[body[:5], None])
        large = await call(app, "/score", parts=[b"x" * 2**19] * 4)
        pieces = await call(app, "/score", parts=[body[:5], 0.01, body[5:]])
        slow_and_large = await call(app, "/score", parts=[b"x" * 2**21, 5.0, b"x"])
        asks = {"Expect": "100-continue", "Content-Length": str(2**30)}
        first = await call(app, "/score", headers=asks, parts=[5.0, b""])
        plain = await call(app, "/score", body, {"Content-Encoding": "Identity"})
        return [answer.status for answer in (slow, gone, large, pieces, slow_and_large, first, plain)]

    assert serve(scorer, scenario) == [408, 499, 413, 200, 408, 413, 200]


def test_a_name_that_is_there_twice_is_refused(scorer: Scorer) -> None:
    """Which of two completions was meant? Readers differ, and the caller would hear a number."""
    twice = [
        b'{"prompt": "Hi.", "completion": "good", "completion": "bad"}',
        b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "completion": "good"}',
    ]
    same = b'{"prompt": "Hi.", "completion": "good", "completion": "good"}'

    async def scenario(app: Any, _: Rewards) -> list[Answer]:
        return [await call(app, "/score", body) for body in (*twice, same)]

    *refused, scored = serve(scorer, scenario)
    assert [answer.status for answer in refused] == [400, 400]
    assert refused[0].json == {"error": "'completion' is there twice, with different values"}
    assert scored.status == 200


def test_a_full_queue_says_come_again(scorer: Scorer) -> None:
    async def scenario(app: Any, _: Rewards) -> tuple[list[Answer], Answer]:
        asking = [asyncio.create_task(post(app, "/score", asked(SAMPLES[i % 4]))) for i in range(9)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        busy = await call(app, "/readyz")
        return await asyncio.gather(*asking), busy

    answers, busy = serve(scorer, scenario, max_waiting=6)
    assert sorted(answer.status for answer in answers) == [200] * 6 + [429] * 3
    assert {answer.headers.get("retry-after") for answer in answers if answer.status == 429} == {"1"}
    assert busy.status == 429


def test_callers_who_leave_harm_nobody(scorer: Scorer) -> None:
    async def scenario(app: Any, rewards: Rewards) -> list[int]:
        asking = [asyncio.create_task(post(app, "/score", asked(s))) for s in SAMPLES]
        await asyncio.sleep(0.001)
        asking[0].cancel()
        rest = await asyncio.gather(*asking[1:])
        assert rewards.batcher.waiting == 0
        return [answer.status for answer in rest]

    assert serve(scorer, scenario) == [200] * 3


# ---- who may ask, and what is shown ----


def test_a_token_is_asked_for_everywhere(scorer: Scorer) -> None:
    basic = base64.b64encode(b"poise:secret").decode()

    async def scenario(app: Any, _: Rewards) -> list[Answer]:
        pages = [await call(app, page) for page in ("/healthz", "/readyz", "/metrics", "/openapi.json")]
        wrong = [
            await post(app, "/score", asked(SAMPLES[0]), Authorization=value)
            for value in ("Bearer no", "secret", "Basic !", "Basic c2VjcmV0", "Bearer", "Token secret", "Bearer ü")
        ]
        right = [
            await post(app, "/score", asked(SAMPLES[0]), Authorization=value)
            for value in ("Bearer secret", f"Basic {basic}", "bearer secret")
        ]
        return [*pages, *wrong, *right]

    answers = serve(scorer, scenario, token="secret")
    assert [answer.status for answer in answers] == [401] * 11 + [200] * 3
    assert answers[0].headers["www-authenticate"] == "Bearer"


def test_anything_but_loopback_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POISE_TOKEN", raising=False)
    ServeConfig(("rm",)).check()
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(PoiseError, match="set a token in POISE_TOKEN"):
            ServeConfig(("rm",), host=host).check()
    empty = tmp_path / "token"
    empty.write_text(" \n")
    for file, line in ((empty, "is empty"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(PoiseError, match=line):
            ServeConfig(("rm",), host="0.0.0.0", token_file=str(file)).check()
    monkeypatch.setenv("POISE_TOKEN", "secret")
    ServeConfig(("rm",), host="0.0.0.0").check()
    with pytest.raises(PoiseError, match="need --reference"):
        ServeConfig(("rm", "rm2")).check()
    with pytest.raises(PoiseError, match="scored together"):
        ServeConfig(("rm",), objective="expected_tradeoff(0.4)").check()
    with pytest.raises(PoiseError, match="give --scale"):
        ServeConfig(("rm",), reward_ceiling=2.0).check()
    with pytest.raises(PoiseError, match="--reward-floor must be below --reward-ceiling, got 2 and 1"):
        ServeConfig(("rm",), scale="scale.json", reward_ceiling=1.0, reward_floor=2.0).check()
    ServeConfig(("rm",), scale="scale.json", reward_ceiling=2.0).check()


def test_metrics_and_log_show_every_head(scorer: Scorer, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    async def scenario(app: Any, _: Rewards) -> str:
        for sample in SAMPLES:
            await post(app, "/score", asked(sample))
        await call(app, "/score", b"{")
        return (await call(app, "/metrics")).body.decode()

    page = serve(scorer, scenario, log=str(log))
    heads = scorer(SAMPLES)
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    for k in range(heads.mean.shape[-1]):
        assert float(found[f'poise_head_mean_sum{{head="{k}"}}']) == pytest.approx(
            heads.mean[:, k].sum().item(), abs=1e-4
        )
        assert float(found[f'poise_head_std_count{{head="{k}"}}']) == 4
    assert float(found['poise_requests_total{path="/score",status="200"}']) == 4
    assert float(found['poise_requests_total{path="/score",status="400"}']) == 1
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["completion"] for row in rows] == [sample.completion for sample in SAMPLES]
    assert all(len(row["mean"]) == heads.mean.shape[-1] and len(row["request"]) == 64 for row in rows)


def test_the_help_of_sums_that_fall_says_how_to_read_them() -> None:
    """rate() takes a sum that falls for a restart, and rewards are negative as often as not."""
    page = Metrics().page().decode()
    for name in ("reward", "nominal", "worst_case", "validator", "head_mean"):
        assert f"mean by delta(poise_{name}_sum[5m]) / delta(poise_{name}_count[5m]), not by rate()" in page
    assert "delta(poise_gap" not in page


def test_a_log_that_cannot_be_written_stops_no_training(
    scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(app: Any, _: Rewards) -> list[int]:
        return [(await post(app, "/score", asked(sample))).status for sample in SAMPLES]

    assert serve(scorer, scenario, log=str(tmp_path)) == [200] * 4
    assert capsys.readouterr().err.count("nothing more is written") == 1


def test_the_monitor_rings() -> None:
    metrics = Metrics()
    for step in range(12):
        rows = [{**ROW, "reward": (i % 7) + (0.0 if step < 6 else 40.0)} for i in range(256)]
        text = "a fine film it is " if step < 6 else "so so so so so so so so "
        metrics.scored("/score", "x", [Sample("a", f"{text}{i}") for i in range(256)], rows)
        assert (b"poise_alarm 1.0" in metrics.page()) == (step >= 6), step


def test_the_document_names_every_endpoint(scorer: Scorer) -> None:
    async def scenario(app: Any, _: Rewards) -> tuple[Answer, set[str]]:
        return await call(app, "/openapi.json"), {route.path.rstrip("/") for route in app.routes}

    answer, paths = serve(scorer, scenario)
    document = answer.json
    assert document["paths"].keys() == paths
    assert "ScoreRequest" in document["components"]["schemas"]
    refs = [part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
    assert set(refs) <= document["components"]["schemas"].keys()
