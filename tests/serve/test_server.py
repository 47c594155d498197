"""Over real sockets: many callers, a stop under load, a restart behind the client, and adapters of other engines."""

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

import forked
from poise.cli.main import main
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import tradeoff
from poise.integrations import openrlhf_reward, slime_reward, trl_http, verl_reward
from poise.integrations.trl_http import ServedReward
from poise.models.scorer import Scorer
from poise.serve.app import make_app
from poise.serve.backend import of_scorer
from poise.serve.client import Client
from poise.serve.metrics import Metrics
from poise.serve.rewards import Rewards


@pytest.fixture(scope="module")
def url(scorer: Scorer) -> Iterator[str]:
    with serving(scorer) as url:
        yield url


@contextlib.contextmanager
def serving(scorer: Scorer, token: str = "") -> Iterator[str]:
    """A server in a thread of this process."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        app = make_app(Rewards(of_scorer(scorer, ""), "tradeoff(0.4)"), Metrics(), token=token)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_64_callers_get_their_own_rewards(scorer: Scorer, url: str) -> None:
    samples = [Sample(f"Review number {i % 8}.", f"It is a good one, {i}.") for i in range(192)]
    expected = tradeoff(scorer(samples), 0.4)
    client = Client(url, patience=30.0)  # it checks the hash of each answer

    def ask(sample: Sample) -> float:
        return float(client.score(sample.prompt, [sample.completion])[0]["reward"])

    with ThreadPoolExecutor(64) as callers:
        rewards = list(callers.map(ask, samples))
    torch.testing.assert_close(torch.tensor(rewards), expected, rtol=0, atol=1e-5)

    async def together() -> list[Any]:
        return await asyncio.gather(*(client.ascore(s.prompt, [s.completion]) for s in samples[:64]))

    rewards = [rows[0]["reward"] for rows in asyncio.run(together())]
    torch.testing.assert_close(torch.tensor(rewards), expected[:64], rtol=0, atol=1e-5)


def test_half_a_request_blocks_nobody(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for part in (
            b"",
            b"POST /score HTTP/1.1\r\nHost",
            b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
        ):
            half = stack.enter_context(socket.create_connection((host, int(port))))
            half.sendall(part)
        assert Client(url, patience=5.0).score("Hi.", ["Good."])[0]["reward"]
    assert Client(url, patience=5.0).score("Hi.", ["Good."])[0]["reward"]  # they left


def test_a_body_that_is_too_large_is_said_to_the_caller(url: str) -> None:
    """A server that answers before it has read all resets the connection, and the client asks again for minutes."""
    with pytest.raises(PoiseError, match=r"/score: 413 a body of more than 8388608 bytes; send less at once$"):
        Client(url, patience=5.0).score("x" * 20 * 2**20, ["Good."])


def test_a_wrong_token_is_said_to_the_caller_of_a_large_body(scorer: Scorer) -> None:
    with serving(scorer, "secret") as url:
        with pytest.raises(PoiseError, match=r"/score: 401 this server needs a bearer token$"):
            Client(url, "wrong", patience=5.0).score("x" * 20 * 2**20, ["Good."])
        coded = urllib.request.Request(
            f"{url}/score", b"x" * 20 * 2**20, {"Authorization": "Bearer secret", "Content-Encoding": "zstd"}
        )
        with pytest.raises(urllib.error.HTTPError, match="415"):
            urllib.request.urlopen(coded, timeout=20)


# ---- the client ----


@contextlib.contextmanager
def scripted(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives these answers, one after the other; it hangs up at status 0."""
    seen: list[dict[str, str]] = []
    rest = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(dict(self.headers))
            status, value = rest.pop(0)
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write((value(body) if callable(value) else json.dumps(value)).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def good(reward: Any) -> Callable[[bytes], str]:
    import hashlib

    row = {"reward": reward, "mean": [1.0], "std": [0.0]}
    return lambda body: json.dumps({"scores": [row], "request": hashlib.sha256(body).hexdigest()})


def test_the_client_asks_again_and_carries_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with scripted((0, ""), (503, {"error": "x"}), (429, {"error": "x"}), (200, good(1.5))) as (url, seen):
        assert Client(url, token="secret").score("a", ["b"])[0]["reward"] == 1.5
    assert len(naps) == 3
    assert [headers["Authorization"] for headers in seen] == ["Bearer secret"] * 4


def test_the_client_says_why_it_is_put_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two texts to a server that waits for 64: ten minutes without a word."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for refusals, said in ((2, 0), (5, 1)):
        caplog.clear()
        with scripted(*[(503, {"error": "2 are here; send more"})] * refusals, (200, good(1.5))) as (url, _):
            assert Client(url).score("a", ["b"])[0]["reward"] == 1.5
        assert [line for line in caplog.messages if "send more; asking again for" in line] == caplog.messages
        assert len(caplog.messages) == said


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ((422, {"error": "no such form"}), "422 no such form"),
        ((500, {"error": "a head is not finite"}), "500 a head is not finite"),
        ((200, lambda _: "[1]"), "answered another request"),
        ((200, {"scores": [{"reward": 1.0}], "request": "x"}), "answered another request"),
        ((200, lambda _: "<html>"), "did not answer in JSON"),
        ((200, good(None)), "gave no reward"),
        ((200, good(float("nan"))), "gave no reward"),
    ],
)
def test_the_client_makes_up_no_number(answer: tuple[int, Any], line: str) -> None:
    with scripted(answer) as (url, _), pytest.raises(PoiseError, match=line) as error:
        Client(url).score("a", ["b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_in_every_form(number: float) -> None:
    import hashlib

    def answer(body: bytes) -> str:
        return json.dumps({"rewards": [0.5], "head_0": number, "request": hashlib.sha256(body).hexdigest()})

    with scripted((200, answer)) as (url, _), pytest.raises(PoiseError, match=r"gave no reward, but (NaN|Infinity)"):
        Client(url).post("/get_reward", {})


def test_the_clients_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(PoiseError, match=r"gave no answer in 0\.2 s"):
            Client(url, patience=0.2).score("a", ["b"])


@pytest.mark.slow
def test_client_and_adapters_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, poise.serve.client, poise.integrations.verl_reward, poise.integrations.openrlhf_reward;"
        "import poise.integrations.slime_reward, poise.integrations.trl_http, poise.serve.config;"
        "print(sorted({'torch', 'transformers', 'numpy', 'starlette', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- adapters, fed as the engines feed them ----

PROMPT, ANSWER = "Review the film.", "It is a good film."


@pytest.fixture
def expected(scorer: Scorer, url: str, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setenv("POISE_URL", url)
    for module in (verl_reward, openrlhf_reward, slime_reward):
        module._client.cache_clear()
    return float(tradeoff(scorer([Sample(PROMPT, ANSWER)]), 0.4)[0])


def test_verl_gets_the_rewards(expected: float) -> None:
    extra = {"prompt": PROMPT, "num_turns": 2, "rollout_reward_scores": {}}
    given = {"data_source": "films", "solution_str": ANSWER, "ground_truth": "", "extra_info": extra}
    answers = [verl_reward.compute_score_sync(**given), asyncio.run(verl_reward.compute_score(**given))]
    empty = verl_reward.compute_score_sync(**{**given, "solution_str": ""})
    for answer in answers:
        assert answer["score"] == pytest.approx(expected, abs=1e-5)
        assert answer.keys() == empty.keys()
        assert all(type(value) is float for value in answer.values())
    with pytest.raises(PoiseError, match=r"extra_info\.prompt"):
        verl_reward.compute_score_sync("films", ANSWER, "", {})
    with pytest.raises(PoiseError, match="single-turn agent loop"):
        verl_reward.compute_score_sync("films", ANSWER, "", {**extra, "num_turns": 4})
    with pytest.raises(PoiseError, match="switch off"):
        verl_reward.compute_score_sync(**given, reward_router_address="http://a", reward_model_tokenizer=None)


def test_openrlhf_gets_the_rewards(expected: float, scorer: Scorer) -> None:
    """Once from its executor, with tokens of its own template; once a truncated answer, which has no end of turn."""
    turns = [{"role": "user", "content": PROMPT}]
    rendered = scorer.extract.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for query in (f"{rendered}{ANSWER}<|im_end|>", f"{rendered}{ANSWER}"):
        answer = openrlhf_reward.reward_func([query], [rendered], ["label"])
        assert answer["rewards"].item() == pytest.approx(expected, abs=1e-5)
        assert answer["rewards"].shape == answer["scores"].shape == ()
        assert all(value.shape == () for value in answer["extra_logs"].values())
        assert "head_0" in answer["extra_logs"]


def test_slime_gets_the_rewards(expected: float) -> None:
    sample = types.SimpleNamespace(prompt=PROMPT, response=f"{ANSWER}<|im_end|>", label=None)
    answer = asyncio.run(slime_reward.custom_rm(None, sample))
    assert answer["reward"] == pytest.approx(expected, abs=1e-5)
    group = asyncio.run(slime_reward.custom_rm(None, [sample, sample]))
    assert [one["reward"] for one in group] == pytest.approx([expected] * 2, abs=1e-5)


def test_trl_gets_the_rewards(expected: float, url: str) -> None:
    logged: dict[str, float] = {}
    reward = ServedReward(url)
    found = reward(
        prompts=[PROMPT, PROMPT, [{"role": "user", "content": PROMPT}]],
        completions=[ANSWER, "Bad.", [{"role": "assistant", "content": ANSWER}]],
        completion_ids=[[1]] * 3,
        log_metric=logged.__setitem__,
    )
    assert [found[0], found[2]] == pytest.approx([expected] * 2, abs=1e-5)
    assert found[1] != found[0]
    assert logged["poise/reward"] == pytest.approx(sum(found) / 3)
    assert "poise/head_0" in logged
    assert trl_http.served_reward([PROMPT], [ANSWER]) == pytest.approx([expected], abs=1e-5)


# ---- the command ----


@pytest.mark.slow
def test_a_stop_under_load_answers_what_was_accepted_and_a_restart_loses_nothing(
    brme: str, scorer: Scorer, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    samples = [Sample(f"Review number {i % 8}.", f"It is a good one, {i}.") for i in range(400)]
    expected = tradeoff(scorer(samples), 0.4)
    client = Client(f"http://127.0.0.1:{port}", patience=200.0)
    first = forked.started(lambda: main(["serve", brme, "--port", port]), stderr=tmp_path / "said")
    with ThreadPoolExecutor(16) as callers:
        client.score("Hi.", ["Good."])  # waits until it is there
        rewards = [callers.submit(client.score, sample.prompt, [sample.completion]) for sample in samples]
        while sum(future.done() for future in rewards) < 40:
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGTERM)
        assert first.ended() == 0
        assert (tmp_path / "said").read_text() == f"5 heads, tradeoff(0.4): http://127.0.0.1:{port}\n"
        assert not all(future.done() for future in rewards)
        second = forked.started(lambda: main(["serve", brme, "--port", port]))
        found = torch.tensor([future.result()[0]["reward"] for future in rewards])
    os.kill(second.pid, signal.SIGTERM)
    assert second.ended() == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_who_waits_for_the_line_may_ask_and_idle_connections_outlive_those_of_proxies(
    brme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        assert "http://127.0.0.1:" in capsys.readouterr().err
        socket.create_connection(sockets[0].getsockname(), timeout=5.0).close()
        assert self.config.timeout_keep_alive > 60

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert main(["serve", brme, "--port", "0"]) == 0


def test_a_port_that_is_taken_and_a_missing_token_are_one_line(
    brme: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POISE_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", brme, "--port", str(taken.getsockname()[1])]) == 2
    assert main(["serve", brme, "--host", "0.0.0.0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot listen at 127.0.0.1" in first
    assert "set a token in POISE_TOKEN" in second


def test_an_unknown_page_is_404(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{url}/nothing")
    assert error.value.code == 404
    error.value.close()


# ---- adapters whose base classes are another project's: stand-ins of the recorded form ----


def module(name: str, monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    parent = ""
    for part in name.split("."):
        parent = f"{parent}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    vars(sys.modules[name]).update(content)


def test_ms_swift_gets_the_rewards(expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORM of 4.6: made with `args`, called with completions and every column; found by its name in `orms`."""

    class AsyncORM:
        def __init__(self, args: Any = None, **_: Any):
            self.args = args

    orms: dict[str, Any] = {}
    module("swift.rewards.orm", monkeypatch, AsyncORM=AsyncORM, orms=orms)
    monkeypatch.delitem(sys.modules, "poise.integrations.ms_swift_reward", raising=False)
    importlib.import_module("poise.integrations.ms_swift_reward")
    turns = [{"role": "user", "content": PROMPT}]
    messages = [turns, [*turns, {"role": "assistant", "content": ANSWER}]]
    found = asyncio.run(orms["poise"](args=None)(completions=[ANSWER] * 2, messages=messages, solution=["x"] * 2))
    assert found == pytest.approx([expected] * 2, abs=1e-5)


def test_skyrl_gets_the_rewards(expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """BaseTextEnv of skyrl-gym 0.4.0: init(prompt), step(action) with a dict of these keys, get_metrics()."""
    module("skyrl_gym.envs.base_text_env", monkeypatch, BaseTextEnv=object, BaseTextEnvStepOutput=dict)
    monkeypatch.delitem(sys.modules, "poise.integrations.skyrl_env", raising=False)
    env = importlib.import_module("poise.integrations.skyrl_env").PoiseEnv(None, extras={"reward_spec": {}})
    prompt = [{"role": "user", "content": PROMPT}]
    assert env.init(prompt) == (prompt, {})
    step = env.step(f"{ANSWER}<|im_end|>")
    assert step.keys() == {"observations", "reward", "done", "metadata"}
    assert step["done"] is True
    assert step["reward"] == pytest.approx(expected, abs=1e-5)
    assert env.get_metrics()["reward"] == step["reward"]
    assert "head_0" in env.get_metrics()
