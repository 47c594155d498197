"""vLLM on a CPU reads a Poise checkpoint as Poise does: ids = text = messages, and `poise serve --backend vllm`.

Heads with adapters of their own are LoRA modules there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from conftest import CHAT_TEMPLATE, make_tokenizer
from engines_kit import CONVERSATIONS, Server
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import tradeoff
from poise.models.head_adapters import HeadLinear, add_head_adapters, apart
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model, with_heads
from poise.models.scorer import Scorer
from poise.serve import vllm
from poise.serve.client import Client
from poise.serve.config import ServeConfig

CONTEXT = 256  # tokens; the last conversation is longer
CLOSE = 1e-4
WORDS = ["the", "film", "was", "a", "warm", "slow", "funny", "story", "about", "two", "old", "friends", "and", "dogs"]


class Vllm(NamedTuple):
    """A vLLM server and the checkpoint that it serves."""

    url: str
    path: str
    scorer: Scorer
    processes: list[subprocess.Popen[bytes]]  # the last one runs

    def post(self, path: str, value: Any) -> tuple[int, Any]:
        body = json.dumps(value).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def classify(self, **value: Any) -> torch.Tensor:
        status, answer = self.post("/classify", value)
        assert status == 200, answer
        return torch.tensor([row["probs"] for row in answer["data"]])

    def expected(self, samples: list[Sample]) -> torch.Tensor:
        """Logits by the checkpoint's own weights in this process."""
        tokens = [self.scorer.extract.encode(sample) for sample in samples]
        return self.scorer.extract.forward(tokens) @ self.scorer.weight.T

    def ids(self, sample: Sample) -> list[int]:
        prompt, completion = self.scorer.extract.encode(sample)
        return [*prompt, *completion]


def make_reward_model(folder: Path) -> str:
    """Random weights, with heads as wide as vLLM's attention on CPUs takes them; saved as `poise train-reward` does."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, vocab_size=len(tokenizer), bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    classifier, tokenizer = load_trunk(str(folder / "base"), 0)
    layout = HeadLayout(5, "gaussian", tuple(0.1 * i for i in range(10)))
    save_reward_model(folder / "rm", classifier, tokenizer, torch.randn(10, 128) / 5, layout)
    return str(folder / "rm")


def make_adapted(trunk: str, folder: Path) -> str:
    """Three heads with random adapters of their own on the upper layer, saved as `poise train-reward` does."""
    torch.manual_seed(1)
    classifier, tokenizer = load_trunk(trunk, 0)
    weight = torch.randn(6, 128) / 5
    with_heads(classifier, weight)
    add_head_adapters(classifier, 3, 4, 1)
    for module in classifier.modules():
        if isinstance(module, HeadLinear):
            module.up_KOR.data.normal_(std=0.1)
    layout = HeadLayout(3, "gaussian", tuple(0.1 * i for i in range(6)), adapters=True)
    save_reward_model(folder, classifier, tokenizer, apart(weight, 3), layout)
    return str(folder)


def started(path: str, log: Path, port: int, *more: str) -> subprocess.Popen[bytes]:
    """vLLM with its own defaults, but for float32; the flag lets a test send the stock template."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--served-model-name", "rm",
               "--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--port", str(port),
               "--trust-request-chat-template", *more]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=file, stderr=file)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return process
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@pytest.fixture(scope="module")
def brme(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_reward_model(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def engine(brme: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    port = free_port()
    processes = [started(brme, tmp_path_factory.mktemp("log") / "vllm.log", port)]
    yield Vllm(f"http://127.0.0.1:{port}", brme, Scorer.load(brme), processes)
    stop(processes[-1])


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """The conversations that fit the context, and more up to 64."""
    generator = torch.Generator().manual_seed(0)

    def words(number: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (number,), generator=generator).tolist())

    texts = [Sample(prompt, answer) for prompt, answer in CONVERSATIONS[:-1]]
    more = [Sample(f"Review {words(1 + i % 7)}.", f"{words(1 + i % 11)}.") for i in range(64 - len(texts))]
    return texts + more


def turns(sample: Sample) -> list[dict[str, str]]:
    before = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
    return [*before, {"role": "assistant", "content": sample.completion}]


RESULT: dict[str, Any] = {}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest: float = (found - expected).abs().max().item()
    assert largest < CLOSE
    return largest


def test_ids_text_and_messages_have_the_scorers_logits(engine: Vllm, samples: list[Sample]) -> None:
    expected = engine.expected(samples)
    assert expected.std(0).min() > 0.1  # equal logits would show nothing
    ids = engine.classify(input=[engine.ids(sample) for sample in samples], use_activation=False)
    tokenizer = engine.scorer.extract.tokenizer
    written = [tokenizer.apply_chat_template(turns(sample), tokenize=False) for sample in samples]
    text = engine.classify(input=written, add_special_tokens=False, use_activation=False)
    messages = torch.cat([engine.classify(messages=turns(sample), use_activation=False) for sample in samples])
    RESULT["texts"] = len(samples)
    RESULT["largest_difference"] = {
        "ids": difference(ids, expected), "text": difference(text, expected), "messages": difference(messages, expected)
    }  # fmt: skip


def test_a_stock_template_reads_another_token(engine: Vllm, samples: list[Sample]) -> None:
    """What the template in the checkpoint is there for: the same messages as ChatML ends them."""
    asked = [{"messages": turns(sample), "chat_template": CHAT_TEMPLATE} for sample in samples[:16]]
    found = torch.cat([engine.classify(**one, use_activation=False) for one in asked])
    expected = engine.expected(samples[:16])
    assert (found - expected).abs().max() > 1000 * CLOSE
    RESULT["stock_template_largest_difference"] = (found - expected).abs().max().item()


def test_poise_serve_in_front_of_vllm_has_the_scorers_rewards(engine: Vllm, samples: list[Sample]) -> None:
    """Also of a text longer than the context, which only Poise shortens, and of a group."""
    server = Server(engine.path)
    server._command += ["--backend", "vllm", "--url", engine.url]
    server.start()
    try:
        every = [Sample(*pair) for pair in CONVERSATIONS] + samples
        found = [Client(server.url).score(sample.prompt, [sample.completion])[0] for sample in every]
        group = Client(server.url).score(every[0].prompt, [sample.completion for sample in every])
    finally:
        server.stop()
    assert found[5]["truncated"]
    heads = engine.scorer(every)
    rewards = difference(torch.tensor([row["reward"] for row in found]), tradeoff(heads, 0.4))
    means = difference(torch.tensor([row["mean"] for row in found]), heads.mean)
    stds = difference(torch.tensor([row["std"] for row in found]), heads.std)
    expected = tradeoff(engine.scorer([Sample(every[0].prompt, sample.completion) for sample in every]), 0.4)
    together = difference(torch.tensor([row["reward"] for row in group]), expected)
    RESULT["poise_serve"] = {"rewards": rewards, "means": means, "stds": stds, "group_of_70": together}
    assert len(group) == 70


def test_the_longest_sample_fits_and_a_longer_one_is_refused(engine: Vllm) -> None:
    assert engine.classify(input=[[5] * CONTEXT], use_activation=False).shape == (1, 10)
    status, answer = engine.post("/classify", {"input": [[5] * (CONTEXT + 1)], "use_activation": False})
    assert status == 400
    RESULT["too_long"] = {"status": status, "answer": answer}


def test_another_checkpoint_is_refused(engine: Vllm, tmp_path: Path) -> None:
    classifier, tokenizer = load_trunk(engine.path, 0)
    save_reward_model(tmp_path / "rm", classifier, tokenizer, engine.scorer.weight.flip(0), engine.scorer.layout)
    with pytest.raises(PoiseError, match="does not read as the checkpoint does"):
        vllm.remote(ServeConfig((str(tmp_path / "rm"),), backend="vllm", url=(engine.url,)))


def test_a_vllm_that_is_killed_and_restarted_loses_no_request(
    engine: Vllm, samples: list[Sample], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Poise answers 503 while vLLM is away, and its client asks again until vLLM is back."""
    server = Server(engine.path)
    server._command += ["--backend", "vllm", "--url", engine.url]
    request.addfinalizer(server.stop)
    server.start()
    client = Client(server.url)
    client.score("Hi.", ["Good."])
    stop(engine.processes[-1])
    answers: dict[int, float] = {}
    callers = [threading.Thread(target=lambda i=i: answers.update({i: reward(client, samples[i])})) for i in range(8)]
    for caller in callers:
        caller.start()
    began = time.monotonic()
    while b'"/score",status="503"' not in (page := metrics(server)).replace(b" ", b""):
        assert time.monotonic() < began + 60, page
        time.sleep(0.5)
    engine.processes.append(started(engine.path, tmp_path / "vllm.log", int(engine.url.rpartition(":")[2])))
    RESULT["seconds_without_vllm"] = round(time.monotonic() - began, 1)
    for caller in callers:
        caller.join(120)
    difference(torch.tensor([answers[i] for i in range(8)]), tradeoff(engine.scorer(samples[:8]), 0.4))


@pytest.fixture(scope="module")
def adapted(brme: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """vLLM with a LoRA module for each head, as the line in docs/serving.md starts it."""
    folder = tmp_path_factory.mktemp("adapted")
    path = make_adapted(brme, folder / "rm")
    modules = [f"head_{k}={path}/adapters/head_{k}" for k in range(3)]
    port = free_port()
    options = ("--enable-lora", "--max-loras", "3", "--lora-modules", *modules)
    processes = [started(path, folder / "vllm.log", port, *options)]
    yield Vllm(f"http://127.0.0.1:{port}", path, Scorer.load(path), processes)
    stop(processes[-1])


def test_adapters_of_heads_have_the_scorers_logits(adapted: Vllm, samples: list[Sample]) -> None:
    """Head k's labels, k and 3 + k, of its own module; all others are of heads that this adapter is not for."""
    expected = adapted.expected(samples)
    ids = [adapted.ids(sample) for sample in samples]
    found = [adapted.classify(model=f"head_{k}", input=ids, use_activation=False) for k in range(3)]
    own = max(difference(found[k][:, k::3], expected[:, k::3]) for k in range(3))
    others = [(found[k] - expected)[:, [(k + 1) % 3, 3 + (k + 1) % 3]].abs().max().item() for k in range(3)]
    assert min(others) > 1000 * CLOSE
    RESULT["heads_with_adapters"] = {"largest_difference": own}


def test_poise_serve_reads_heads_with_adapters_by_vllm(adapted: Vllm, samples: list[Sample]) -> None:
    server = Server(adapted.path)
    server._command += ["--backend", "vllm", "--url", adapted.url]
    server.start()
    try:
        found = [Client(server.url).score(sample.prompt, [sample.completion])[0] for sample in samples[:8]]
    finally:
        server.stop()
    heads = adapted.scorer(samples[:8])
    means = difference(torch.tensor([row["mean"] for row in found]), heads.mean)
    stds = difference(torch.tensor([row["std"] for row in found]), heads.std)
    rewards = difference(torch.tensor([row["reward"] for row in found]), tradeoff(heads, 0.4))
    RESULT["heads_with_adapters"] |= {"means": means, "stds": stds, "rewards": rewards}


def metrics(server: Server) -> bytes:
    with urllib.request.urlopen(server.url + "/metrics") as response:
        return bytes(response.read())


def reward(client: Client, sample: Sample) -> float:
    return float(client.score(sample.prompt, [sample.completion])[0]["reward"])


def test_the_result_is_kept(engine: Vllm) -> None:
    """The dated result, and answers for tests/serve/vllm_answers.json."""
    with urllib.request.urlopen(engine.url + "/v1/models") as response:
        models = json.loads(response.read())
    _, classify = engine.post("/classify", {"input": [[5, 6, 7], [8, 9]], "use_activation": False})
    assert models["data"][0]["max_model_len"] == CONTEXT
    if path := os.environ.get("ENGINE_RESULT"):
        content = {"engine": "vllm-cpu", "version": metadata.version("vllm-cpu"), "date": time.strftime("%Y-%m-%d")}
        models["data"][0]["root"] = "rm"  # not the folder of this machine
        too_long = RESULT.pop("too_long")
        Path(path).write_text(json.dumps({**content, **RESULT}, indent=1) + "\n")
        answers = {**content, "models": models, "classify": classify, "too_long": too_long}
        Path(path).with_name("answers.json").write_text(json.dumps(answers, indent=1) + "\n")
