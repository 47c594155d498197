"""The client and the adapters that ask it, given what is wrong: a line that says so, at once, and never a number."""

import asyncio
import copy
import email
import importlib
import io
import logging
import math
import os
import pickle
import sys
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from as_installed import poise_as_installed

URL = "http://127.0.0.1:9"
ROW = {"reward": 1.0, "mean": [1.0, 2.0], "std": [0.1, 0.2], "gap": 0.5}


@pytest.fixture(scope="module")
def poise() -> Iterator[Any]:
    with poise_as_installed() as package:
        yield package


@pytest.fixture
def answers(poise: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what every client gets as the answer to anything."""
    client = importlib.import_module(f"{poise.__name__}.serve.client")
    return lambda answer: monkeypatch.setattr(client.Client, "post", lambda *_: answer)


def refused(poise: Any, call: Callable[[], Any]) -> str:
    with pytest.raises(poise.PoiseError, match=r"^[^\n]+$") as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "localhost:8400"}, "reward server 'localhost:8400': an address was expected, e.g. http://"),
        ({"url": "ftp://x"}, "reward server 'ftp://x': an address was expected"),
        ({"url": "http://[::1"}, "reward server 'http://[::1': an address was expected"),
        ({"url": "http://a:99999"}, "reward server 'http://a:99999': an address was expected"),
        ({"url": "http://a..b"}, "reward server 'http://a..b': an address was expected"),
        ({"url": "http://a/ü"}, "reward server 'http://a/ü': an address was expected"),
        ({"url": 8400}, "reward server '8400': an address was expected"),
        ({"timeout": "5"}, "timeout must be a finite number, got '5'"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"patience": math.nan}, "patience must be a finite number, got nan"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"url": "http://a:8400/score"}, "reward server http://a:8400/score: give the address without /score"),
        (
            {"url": "http://a:8400/get_reward/"},
            "reward server http://a:8400/get_reward/: give the address without /get",
        ),
        ({"token": " secret"}, "the token of the reward server must be one line of plain characters"),
        ({"token": "secret\nline"}, "the token of the reward server must be one line of plain characters"),
    ],
)
def test_a_client_that_could_ask_nobody_is_not_made(poise: Any, arguments: dict[str, Any], said: str) -> None:
    """An address without http was asked for ten minutes; patience that is no number had no end."""
    from poise.serve import client

    found = refused(poise, lambda: client.Client(**arguments))
    assert found.startswith(said)
    assert "secret" not in found


@pytest.mark.parametrize("prompt", [[b"text"], [{"role": "user", "content": {1, 2}}], [math.nan]])
def test_what_json_does_not_hold_is_not_sent(poise: Any, prompt: Any) -> None:
    from poise.serve import client

    assert f"{URL}/score cannot be asked: " in refused(poise, lambda: client.Client(URL).score(prompt, ["a"]))


@pytest.mark.parametrize(
    ("prompt", "completions", "said"),
    [
        (None, ["a"], "a prompt is text or a list of turns, not NoneType"),
        (b"p", ["a"], "a prompt is text or a list of turns, not bytes"),
        ({"role": "user"}, ["a"], "a prompt is text or a list of turns, not dict"),
        ("p", None, "completions are a list of texts, not NoneType"),
        ("p", np.array("a"), "completions are a list of texts, not ndarray"),
        ("p", b"ab", "completions are a list of texts, not one text"),
        ("p", {"a": 1}, "completions are a list of texts, not dict"),
        ("p", ["a", None], "completions are a list of texts, and number 2 is NoneType"),
        ("p", [b"a"], "completions are a list of texts, and number 1 is bytes"),
        ("p", [[{"role": "assistant", "content": "a"}]], "completions are a list of texts, and number 1 is list"),
    ],
)
def test_what_is_no_prompt_and_no_text_is_not_sent(poise: Any, prompt: Any, completions: Any, said: str) -> None:
    """The keys of a mapping were scored."""
    from poise.serve import client

    asking = client.Client(URL)
    assert refused(poise, lambda: asking.score(prompt, completions)) == said
    if prompt == "p" and isinstance(completions, list):
        assert refused(poise, lambda: asking.one(prompt, completions[-1])).startswith("responses are a list of texts")
        assert refused(poise, lambda: asking.of_queries(["q"], ["p"] * 2)).startswith("1 queries and 2 prompts")
        assert refused(poise, lambda: asking.of_queries(["q"] * 2, completions)) == said.replace(
            "completions", "prompts"
        )


@pytest.mark.parametrize("completions", [np.array(["a", "b"]), ("a", "b"), iter(["a", "b"])])
def test_any_list_of_texts_is_one(answers: Any, completions: Any) -> None:
    from poise.serve import client

    answers({"scores": [ROW, ROW]})
    turns = np.array([{"role": "user", "content": "p"}], dtype=object)  # as Parquet gives them
    assert client.Client(URL).score(turns, completions) == [ROW, ROW]


@pytest.mark.parametrize(
    ("url", "token"), [("", ""), (" \n", "\n"), (f"{URL}\n", "secret\n"), (f"  {URL}/", " secret ")]
)
def test_variables_as_shells_set_them(poise: Any, monkeypatch: pytest.MonkeyPatch, url: str, token: str) -> None:
    """Files that variables are read from end in a newline; an empty variable is none."""
    client = importlib.import_module(f"{poise.__name__}.serve.client")
    monkeypatch.setenv("POISE_URL", url)
    monkeypatch.setenv("POISE_TOKEN", token)
    made = client.Client()
    assert (made.url, made.token) == ((URL, "secret") if url.strip() else (client.DEFAULT_URL, ""))


def test_a_client_is_copied_and_sent_to_workers_after_it_was_used(answers: Any) -> None:
    """Its threads are its process's own: a pickle was refused, and a fork waited for them for ever."""
    from poise.integrations.trl_http import ServedReward

    answers({"scores": [ROW]})
    reward = ServedReward(URL)
    for one in (reward, copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert asyncio.run(one.client.ascore("p", ["a"])) == [ROW]
        assert pickle.loads(pickle.dumps(one))(["p"], ["a"]) == [1.0]
    gone = ThreadPoolExecutor(1)
    gone.shutdown()
    reward.client._threads = os.getpid() + 1, gone  # as a fork finds it
    assert asyncio.run(reward.client.ascore("p", ["a"])) == [ROW]


def test_that_nobody_answers_is_said_while_it_waits(
    poise: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong address was asked for ten minutes without a word."""
    from poise.serve import client

    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    with caplog.at_level(logging.WARNING, "poise"):
        refused(poise, lambda: client.Client(URL, patience=0.6).score("p", ["a"]))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{URL}: ")
    assert caplog.messages[0].endswith("asking again for 0.6 s")


# ---- engines ----

TURNS = [{"role": "user", "content": "p"}]


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch, poise: Any) -> Any:
    """ms-swift's base class, stood in for."""
    orm = SimpleNamespace(AsyncORM=type("AsyncORM", (), {"__init__": lambda *_, **__: None}), orms={})
    for name in ("swift", "swift.rewards"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "swift.rewards.orm", orm)
    monkeypatch.delitem(sys.modules, "poise.integrations.ms_swift_reward", raising=False)
    importlib.import_module(f"{poise.__name__}.integrations.ms_swift_reward")
    yield orm.orms["poise"]()
    sys.modules.pop("poise.integrations.ms_swift_reward", None)


@pytest.mark.parametrize(
    ("completions", "messages", "said"),
    [
        (["a"], [[]], "a prompt that is a list must hold turns"),
        (["a"], [None], "a prompt must be text or a list of turns, not NoneType"),
        (["a"], [[{"content": "p"}]], "a prompt that is a list must hold turns"),
        (["a", "b"], [TURNS], "1 prompts and 2 completions; there must be one for each"),
        (None, [TURNS], "a reward takes a list of completions, not NoneType"),
        ([None], [TURNS], "a completion must be text or a list of turns, not NoneType"),
    ],
)
def test_ms_swift_s_rows_are_checked(poise: Any, swift: Any, completions: Any, messages: Any, said: str) -> None:
    assert refused(poise, lambda: asyncio.run(swift(completions, messages))).startswith(said)


def test_ms_swift_s_rows_of_any_form(swift: Any, answers: Any) -> None:
    answers({"scores": [ROW]})
    answered = [*TURNS, {"role": "assistant", "content": "a"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "p"}]}]
    texts = ["a", answered[-1:], "a", "a"]
    found = asyncio.run(swift(texts, [TURNS, answered, np.array(answered, dtype=object), parts]))
    assert found == [1.0] * 4
    assert asyncio.run(swift([], [])) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "a prompt must be text or a list of turns, not NoneType"),
        ({"role": "user"}, "a prompt must be text or a list of turns, not dict"),
        (["p"], "a prompt that is a list must hold turns"),
    ],
)
def test_skyrl_s_prompts_are_checked(
    poise: Any, answers: Any, monkeypatch: pytest.MonkeyPatch, prompt: Any, said: str
) -> None:
    """Of a mapping the names were the conversation."""
    base = SimpleNamespace(BaseTextEnv=object, BaseTextEnvStepOutput=dict)
    for name in ("skyrl_gym", "skyrl_gym.envs"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "skyrl_gym.envs.base_text_env", base)
    monkeypatch.delitem(sys.modules, "poise.integrations.skyrl_env", raising=False)
    env = importlib.import_module(f"{poise.__name__}.integrations.skyrl_env").PoiseEnv(None)
    assert refused(poise, lambda: env.init(prompt)).startswith(said)
    answers({"reward": 1.0, "gap": 0.5, "request": "x"})
    env.init(np.array(TURNS, dtype=object))
    assert env.step("a")["reward"] == 1.0
    assert refused(poise, lambda: env.step(None)) == "responses are a list of texts, and number 1 is NoneType"
    sys.modules.pop("poise.integrations.skyrl_env", None)


def test_ray_serve_s_paths_are_those_of_the_folder_it_is_called_in(
    poise: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Replicas run where Ray was started, and took `runs/reward` for a hub id."""

    class Placed(SimpleNamespace):
        def options(self, **_: Any) -> Any:
            return SimpleNamespace(bind=lambda options: options)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=SimpleNamespace(deployment=Placed)))
    monkeypatch.setattr(Placed, "__init__", lambda *_: None)
    monkeypatch.delitem(sys.modules, "poise.integrations.ray_serve", raising=False)
    module = importlib.import_module(f"{poise.__name__}.integrations.ray_serve")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rm").mkdir()
    (tmp_path / "p.jsonl").touch()
    found = module.app({"rewards": "rm,org/model", "scale": "new", "reference": "p.jsonl"})
    assert found["rewards"] == (str(tmp_path / "rm"), "org/model")
    assert (found["scale"], found["reference"]) == (str(tmp_path / "new"), str(tmp_path / "p.jsonl"))
    assert module.app({"rewards": "org/model"})["rewards"] == ("org/model",)
    sys.modules.pop("poise.integrations.ray_serve", None)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"prompt": "p", "response": "a"}, "a sample has a prompt and a response; one of type dict has not"),
        (SimpleNamespace(prompt=None, response="a"), "a prompt must be text or a list of turns, not NoneType"),
        (SimpleNamespace(prompt="p", response=None), "responses are a list of texts, and number 1 is NoneType"),
        (
            SimpleNamespace(prompt=[{"role": "user", "content": [{"type": "image"}]}], response="a"),
            "turn 1 of 'prompt'",
        ),
    ],
)
def test_slime_s_samples_are_checked(poise: Any, sample: Any, said: str) -> None:
    from poise.integrations.slime_reward import custom_rm

    assert refused(poise, lambda: asyncio.run(custom_rm(None, sample))).startswith(said)


def test_one_text_is_no_list_of_texts(poise: Any) -> None:
    from poise.serve import client

    asking = client.Client(URL)
    assert refused(poise, lambda: asking.score("p", "ab")) == "completions are a list of texts, not one text"
    assert refused(poise, lambda: asking.of_queries("ab", "ab")) == "queries are a list of texts, not one text"


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"scores": None}, {"scores": {"a": 1}}, {"scores": []}, {"scores": [None]}, {"scores": [1.0]},
        *({"scores": [ROW | wrong]} for wrong in (
            {"reward": None}, {"reward": "1"}, {"reward": True}, {"reward": 1e39}, {"mean": None}, {"mean": ["a"]},
            {"mean": 1.0}, {"std": None},
        )),
    ],
)  # fmt: skip
def test_rows_without_a_reward_are_refused(poise: Any, answers: Any, answer: Any) -> None:
    from poise.serve import client

    answers(answer)
    said = refused(poise, lambda: client.Client(URL).score("p", ["a"]))
    assert said == f"{URL} gave no reward for each completion"


WRONG = [{}, {"reward": None}, {"reward": "nan"}, {"reward": [1.0]}, {"reward": 1.0, "gap": None}]


@pytest.mark.parametrize("answer", WRONG)
def test_an_engine_gets_numbers_or_nothing(poise: Any, answers: Any, answer: Any) -> None:
    from poise.integrations.slime_reward import custom_rm

    answers({**answer, "request": "x"})
    sample = SimpleNamespace(prompt="p", response="a")
    said = refused(poise, lambda: asyncio.run(custom_rm(None, sample)))
    assert said.endswith(" gave no reward, or what is no number beside it")


def test_an_engine_gets_every_number(answers: Any) -> None:
    from poise.integrations.slime_reward import custom_rm

    answers({"reward": 1.0, "gap": 0.5, "request": "x"})
    found, sample = {"reward": 1.0, "gap": 0.5}, SimpleNamespace(prompt="p", response="a")
    assert asyncio.run(custom_rm(None, sample)) == found
    assert asyncio.run(custom_rm(None, (sample, sample))) == [found, found]


NONE: dict[str, Any] = {"extra_logs": {}}


@pytest.mark.parametrize(
    "answer",
    [
        {}, NONE, NONE | {"rewards": None}, NONE | {"rewards": [1.0]}, NONE | {"rewards": 1.0},
        NONE | {"rewards": [1.0, None]}, NONE | {"rewards": [[1.0], [1.0]]}, NONE | {"rewards": ["1", "1"]},
        {"rewards": [1.0, 1.0]}, {"rewards": [1.0, 1.0], "extra_logs": {"a": None}},
    ],
)  # fmt: skip
def test_openrlhf_gets_a_reward_for_each_query(poise: Any, answers: Any, answer: Any) -> None:
    """Of two queries one reward was spread over both."""
    from poise.integrations.openrlhf_reward import reward_func

    answers(answer)
    said = refused(poise, lambda: reward_func(["pq", "pr"], ["p", "p"], [None, None]))
    assert said.partition(" gave ")[2] in ("no reward for each query", "what is no number beside the rewards")


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 2.0]])
def test_openrlhf_gets_scalars(answers: Any, rewards: list[float]) -> None:
    from poise.integrations.openrlhf_reward import reward_func

    answers({"rewards": rewards, "extra_logs": {"gap": 0.5}})
    found = reward_func(["q"] * len(rewards), ["p"] * len(rewards), [None] * len(rewards))
    assert found["rewards"].tolist() == found["scores"].tolist() == (rewards if len(rewards) > 1 else 1.0)
    assert found["extra_logs"]["gap"].item() == 0.5


@pytest.mark.parametrize(
    ("extra_info", "said"),
    [
        ("abc", "extra_info must have columns, among them prompt; it is of type str"),
        ({"prompt": 3}, "a prompt must be text or a list of turns, not int"),
        ({"prompt": math.nan}, "a prompt must be text or a list of turns, not float"),
        ({"prompt": "p", "num_turns": "x"}, "the number of an answer's turns must be a whole number, got 'x'"),
    ],
)
def test_verl_s_columns_are_checked(poise: Any, extra_info: Any, said: str) -> None:
    from poise.integrations.verl_reward import compute_score_sync

    assert refused(poise, lambda: compute_score_sync("d", "a", None, extra_info)) == said


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("body", [b"{}", None], ids=["post", "get"])
def test_a_redirect_is_not_followed(poise: Any, status: int, body: bytes | None) -> None:
    """urllib follows 301 to 303 without the body, and takes the token along to whatever host is named."""
    from poise.runtime.http_json import ask, make_opener

    asked: list[str] = []

    class Redirects(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            asked.append(request.full_url)
            headers = email.message_from_string("Location: http://elsewhere.invalid/score\n\n")
            answer = urllib.response.addinfourl(io.BytesIO(b""), headers, request.full_url, status)
            answer.msg = "Moved"  # type: ignore[attr-defined]
            return answer

    opener = make_opener(Redirects())
    said = refused(poise, lambda: ask(f"{URL}/score", body, key="secret", timeout=1.0, opener=opener))
    place = "http://elsewhere.invalid/score"
    assert said == f"{URL}/score: {status}, the answer is at {place}; give that address, if you trust it"
    assert asked == [f"{URL}/score"]
