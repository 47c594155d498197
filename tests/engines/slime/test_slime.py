"""slime's and miles' own reward clients with both forms of Poise's reward: rewards equal to the server's.

Neither is on the package registry: SLIME_REPO and MILES_REPO name checkouts, and without them the tests are skipped. Of
slime everything from the data file to the training rewards' key runs, with a stand-in for SGLang; of miles its reward
client and what calls it, for its rollout imports SGLang.
"""

import asyncio
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import aiohttp
import pytest
from transformers import AutoTokenizer

from documented_commands import documented
from engines_kit import BROKEN, CONVERSATIONS, Reference, Server, Wire, answering, place, remember
from poise.errors import PoiseError

CUSTOM = "poise.integrations.slime_reward.custom_rm"
TRIES = 10  # of slime


class Engine(NamedTuple):
    name: str
    version: str
    hub: ModuleType
    sample: Any


def checkout(name: str) -> Engine:
    """The modules of slime or miles, from the checkout that the environment names."""
    repository = os.environ.get(f"{name.upper()}_REPO", "")
    if not repository:
        pytest.skip(f"set {name.upper()}_REPO to a checkout of {name}")
    sys.path.insert(0, repository)
    hub = importlib.import_module(f"{name}.rollout.rm_hub")
    assert Path(str(hub.__file__)).is_relative_to(Path(repository).resolve())
    done = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True)
    version = done.stdout.strip() or os.environ.get(f"{name.upper()}_COMMIT", "unknown")
    return Engine(name, version, hub, importlib.import_module(f"{name}.utils.types").Sample)


@pytest.fixture(scope="module")
def slime() -> Engine:
    return checkout("slime")


@pytest.fixture(scope="module")
def miles() -> Engine:
    return checkout("miles")


@pytest.fixture(params=["slime", "miles"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses of a second or more, cut short: slime's own between its tries."""
    kept: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float, *rest: Any) -> None:
        if seconds >= 1:
            kept.append(seconds)
        await sleep(min(seconds, 0.5), *rest)

    monkeypatch.setattr(asyncio, "sleep", short)
    return kept


def run(engine: Engine, start: Callable[[], Any]) -> Any:
    """A coroutine in an event loop of its own, with the session that slime keeps."""

    async def once() -> Any:
        try:
            return await start()
        finally:
            session: aiohttp.ClientSession | None = getattr(engine.hub, "_shared_session", None)
            if session is not None:
                await session.close()

    return asyncio.run(once())


def arguments(wire: Wire, custom: bool = False, **others: Any) -> Namespace:
    rm: dict[str, Any] = {"custom_rm_path": CUSTOM, "rm_type": None} if custom else {
        "custom_rm_path": None, "rm_type": "remote_rm"
    }  # fmt: skip
    return Namespace(rm_url=f"{wire.url}/remote_rm", reward_key="reward", group_rm=False, **rm, **others)


def samples(engine: Engine, brme: str) -> list[Any]:
    """As a rollout leaves them: the prompt as the data set renders it, the answer with its end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(brme)
    return [
        engine.sample(
            prompt=tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
            response=f"{answer}<|im_end|>", label="a label",
        )
        for prompt, answer in CONVERSATIONS
    ]  # fmt: skip


@pytest.mark.parametrize("custom", [False, True])
def test_the_clients_have_the_servers_rewards(
    engine: Engine, brme: str, wire: Wire, reference: Reference, custom: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(wire, custom)
    found = samples(engine, brme)

    async def rewarded() -> list[Any]:
        return await asyncio.gather(*(engine.hub.async_rm(args, sample) for sample in found))

    for sample, reward in zip(found, run(engine, rewarded), strict=True):
        sample.reward = reward
    difference = reference.difference_to([sample.get_reward_value(args) for sample in found])
    assert len({frozenset(sample.reward) for sample in found}) == 1
    assert found[0].reward.keys() >= {"reward", "gap", "head_0", "head_std_0"}
    if engine.name == "miles" and not custom:
        if path := os.environ.get("ENGINE_RESULT"):  # which is slime's
            (Path(path).parent / "miles").mkdir(exist_ok=True)
            monkeypatch.setenv("ENGINE_RESULT", str(Path(path).parent / "miles" / "result.json"))
        remember("miles", wire.calls, version=engine.version, largest_difference=difference)


@pytest.mark.parametrize("custom", [False, True])
def test_a_group_has_the_servers_rewards(
    engine: Engine, brme: str, wire: Wire, reference: Reference, custom: bool
) -> None:
    """`--group-rm`; slime also passes lists of lists, for answers that are several samples."""
    args = arguments(wire, custom)
    found = samples(engine, brme)
    rewards = run(engine, lambda: engine.hub.batched_async_rm(args, found))
    reference.difference_to([reward["reward"] for reward in rewards])
    if custom:
        nested = run(engine, lambda: engine.hub.batched_async_rm(args, [found[:2], found[2:]]))
        reference.difference_to([reward["reward"] for part in nested for reward in part])


# ---- slime from a data file on ----


class SGLang:
    """Answers `/generate` with the next answer for a prompt, in the form that slime reads."""

    def __init__(self, tokenizer: Any, finish: str = "stop"):
        end = "<|im_end|>" if finish == "stop" else ""
        answers = {
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True): [
                text for other, text in CONVERSATIONS if other == prompt
            ]
            for prompt, _ in CONVERSATIONS
        }

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = answers[tokenizer.decode(asked["input_ids"])].pop(0) + end
                ids = tokenizer(text, add_special_tokens=False).input_ids
                meta = {
                    "output_token_logprobs": [[-1.0, token, None] for token in ids], "finish_reason": {"type": finish},
                    "prompt_tokens": len(asked["input_ids"]), "completion_tokens": len(ids), "cached_tokens": 0,
                    "weight_version": "1",
                }  # fmt: skip
                body = json.dumps({"text": text, "meta_info": meta}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def sglang(brme: str, request: pytest.FixtureRequest) -> Iterator[SGLang]:
    server = SGLang(AutoTokenizer.from_pretrained(brme), getattr(request, "param", "stop"))
    yield server
    server.close()


def rollout(slime: Engine, brme: str, sglang: SGLang, args: Namespace, folder: Path) -> list[Any]:
    """Every conversation from a data file through slime's rollout, in groups of one prompt."""
    load = importlib.import_module
    for name, value in {
        "hf_checkpoint": brme, "sglang_server_concurrency": 8, "rollout_num_engines": 1, "rollout_temperature": 1.0,
        "rollout_top_p": 1.0, "rollout_top_k": -1, "rollout_max_response_len": 64, "rollout_stop": None,
        "rollout_stop_token_ids": None, "rollout_skip_special_tokens": False, "sglang_dp_size": 1, "ci_test": True,
        "sglang_router_ip": "127.0.0.1", "sglang_router_port": sglang.server.server_port, "partial_rollout": False,
        "use_rollout_routing_replay": False, "custom_generate_function_path": None, "use_distributed_post": False,
        "mask_offpolicy_in_partial_rollout": False, "sglang_speculative_algorithm": None,
    }.items():  # fmt: skip
        setattr(args, name, value)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "label": "l"}) + "\n" for prompt, _ in CONVERSATIONS))
    tokenizer = AutoTokenizer.from_pretrained(brme)
    options = {"prompt_key": "prompt", "label_key": "label", "apply_chat_template": True}
    data = load("slime.utils.data").Dataset(str(file), tokenizer, None, None, **options)
    groups: dict[str, list[Any]] = {}
    for sample in data.samples:
        groups.setdefault(sample.prompt, []).append(sample)
    http, sampling = load("slime.utils.http_utils"), load("slime.rollout.sglang_rollout")
    http._http_client = None
    load("slime.utils.misc").SingletonMeta._instances.clear()

    async def generate() -> list[Any]:
        http.init_http_client(args)
        state = sampling.GenerateState(args)
        parts = [
            await sampling.generate_and_rm_group(args, group, state.sampling_params.copy()) for group in groups.values()
        ]
        await http._http_client.aclose()
        # SGLang may be asked for the answers to one prompt in any order.
        return sorted((sample for part in parts for sample in part), key=lambda sample: place(vars(sample)))

    return run(slime, generate)  # type: ignore[no-any-return]


@pytest.mark.parametrize("group_rm", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_a_rollout_has_the_servers_rewards(
    slime: Engine, brme: str, sglang: SGLang, wire: Wire, reference: Reference, tmp_path: Path, custom: bool,
    group_rm: bool,
) -> None:  # fmt: skip
    args = arguments(wire, custom)
    args.group_rm = group_rm
    found = rollout(slime, brme, sglang, args, tmp_path)
    assert all(sample.status == slime.sample.Status.COMPLETED for sample in found)
    difference = reference.difference_to([sample.get_reward_value(args) for sample in found])
    if not custom and not group_rm:
        remember("slime", wire.calls, version=slime.version, largest_difference=difference)


@pytest.mark.parametrize("sglang", ["length"], indirect=True)
def test_answers_that_were_cut_off_have_the_same_rewards(
    slime: Engine, brme: str, sglang: SGLang, wire: Wire, reference: Reference, tmp_path: Path
) -> None:
    args = arguments(wire)
    found = rollout(slime, brme, sglang, args, tmp_path)
    assert all(sample.status == slime.sample.Status.TRUNCATED for sample in found)
    reference.difference_to([sample.get_reward_value(args) for sample in found])


# ---- trouble ----


def test_a_restart_loses_nothing_but_with_miles_own_client(
    engine: Engine, brme: str, server: Server, wire: Wire, reference: Reference
) -> None:
    """slime's client asks ten times, Poise's for ten minutes, that of miles once."""

    def during_a_restart(custom: bool) -> list[Any]:
        server.stop()
        back = threading.Timer(1.0, server.start)
        back.start()
        try:
            found = samples(engine, brme)
            return run(engine, lambda: engine.hub.batched_async_rm(arguments(wire, custom), found))  # type: ignore[no-any-return]
        finally:
            back.join()

    reference.difference_to([reward["reward"] for reward in during_a_restart(True)])
    if engine.name == "miles":
        with pytest.raises(aiohttp.ClientError):
            during_a_restart(False)


def test_a_restart_loses_nothing_with_slimes_own_client(
    slime: Engine, brme: str, server: Server, wire: Wire, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # its own pauses
    server.stop()
    back = threading.Timer(4.0, server.start)
    back.start()
    began = time.monotonic()
    found = samples(slime, brme)
    rewards = run(slime, lambda: slime.hub.batched_async_rm(arguments(wire), found))
    back.join()
    assert time.monotonic() - began > 4
    reference.difference_to([reward["reward"] for reward in rewards])


def test_a_refusal_is_asked_again_ten_times_by_slimes_own_client(slime: Engine, wire: Wire, naps: list[float]) -> None:
    """A prompt of another chat template is a 422, which will stay one: slime says so after minutes, Poise's at once."""
    sample = slime.sample(prompt="[INST] Review the film. [/INST]", response="Good.", label="l")
    with pytest.raises(aiohttp.ClientResponseError, match="422"):
        run(slime, lambda: slime.hub.async_rm(arguments(wire), sample))
    assert len(wire.calls) == TRIES
    assert 140 < sum(naps) < 170
    with pytest.raises(PoiseError, match="422 the prompt was rendered with another chat template"):
        run(slime, lambda: slime.hub.async_rm(arguments(wire, custom=True), sample))
    assert len(wire.calls) == TRIES + 1


def test_what_is_no_number_is_refused_by_poises_client_alone(engine: Engine, brme: str, wire: Wire) -> None:
    """This server never answers NaN, but a 500; should another one, slime's and miles' clients would take it."""
    one = samples(engine, brme)[0]
    wire.fault = lambda _: BROKEN
    with pytest.raises(aiohttp.ClientResponseError, match="500"):
        run(engine, lambda: engine.hub.async_rm(arguments(wire), one))
    assert len(wire.calls) == (TRIES if engine.name == "slime" else 1)
    wire.fault = answering("NaN", reward=0.5)
    assert math.isnan(run(engine, lambda: engine.hub.async_rm(arguments(wire), one))["reward"])
    with pytest.raises(PoiseError, match="gave no reward"):
        run(engine, lambda: engine.hub.async_rm(arguments(wire, custom=True), one))


def test_the_documented_command_has_options_that_slime_names(slime: Engine) -> None:
    """Its parser imports Megatron and SGLang: here stand the options that it adds, and those of its own scripts."""
    root = Path(str(slime.hub.__file__)).parents[3]
    added = re.findall(r'"(--[a-z0-9-]+)"', (root / "slime" / "utils" / "arguments.py").read_text())
    used = [
        word for script in root.glob("scripts/run-*.sh") for word in re.findall(r"--[a-z0-9-]+", script.read_text())
    ]
    options = {word for word in documented("slime") if word.startswith("--")}
    assert options <= {*added, *used}
    assert {"--custom-rm-path", "--group-rm", "--reward-key"} <= options & {*added}
