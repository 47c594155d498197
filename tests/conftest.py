"""Tiny models built on the spot: no download, no cache, a fraction of a second each."""

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import forked

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `make test` does; accelerate warns where it is not set
gc.disable()  # until all tests are collected: imports leave little garbage, and look for it for seconds
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
settings.register_profile("poise", deadline=None)  # a loaded machine is no failure
settings.load_profile("poise")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DRAWN: dict[str, Any] = {}  # see `drawn_once`
WORDS = [
    *("good", "bad", "fine", "awful", "film", "phone", "great", "poor", "a", "the", "this", "is", "was"),
    *("really", "not", "love", "hate", "it", ".", ","),
]


def rest_slow(values: Iterable[Any]) -> list[Any]:
    """Values of a parameter of which all but the first are slow: `make test-fast` runs one case of many alike."""
    first, *rest = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands out tests to others runs none, and the others wait until it has started."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import before_poise  # noqa: F401


def pytest_collection_finish() -> None:
    """What is there now stays to the end: no collection looks at it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Libraries set variables such as LOCAL_RANK, by which a later test would join other processes."""
    before = dict(os.environ)
    yield
    kept = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update(before)
    if kept is not None:
        os.environ["PYTEST_CURRENT_TEST"] = kept


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE without merges: every text has tokens, every token is text."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(folder: Path, architecture: str = "llama") -> str:
    """A three-layer language model of random weights, saved as a user's model would be; pad = eos, as in the wild."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    common = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if architecture == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, tie_word_embeddings=True, **common,
        )  # fmt: skip
    elif architecture == "qwen3":
        config = transformers.Qwen3Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=256, **common,
        )  # fmt: skip
    elif architecture == "gemma2":  # its logits are capped, its layers of two kinds
        config = transformers.Gemma2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=256, final_logit_softcapping=1.0, **common,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **common)
    return save_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer, folder)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save a model with larger random weights: as initialized, they are so small that every text scores alike."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the figures of `plots` show, by their data. Figures of equal data are drawn once in a test process: drawing
    takes most of the time of a page. A test of drawing itself clears the dictionary, or does without this."""
    from poise.reports import plots

    def remembered(name: str) -> Callable[..., Any]:
        draw = getattr(plots, name)

        def once(*data: Any) -> Any:
            data, path = (data[:-1], Path(data[-1])) if name.startswith("save_") else (data, None)
            key = f"{name}{data!r}"
            if path is None:
                if key not in DRAWN:
                    DRAWN[key] = draw(*data)
                return DRAWN[key]
            if key not in DRAWN:
                draw(*data, path)
                DRAWN[key] = path.read_bytes()
            return path.write_bytes(DRAWN[key])

        return once

    for name in ("over_optimization", "heads", "stage2", "calibration"):
        monkeypatch.setattr(plots, name, remembered(name))
    for name in ("save_over_optimization", "save_calibration", "save_reliability"):
        monkeypatch.setattr(plots, name, remembered(name))
    return DRAWN


def _undrawn() -> Iterator[None]:
    """Figures are made and not drawn: drawing takes most of the time of a command that writes cards and pages. In the
    place of each picture is a digest of what its axes show, so that pictures of other data still differ."""
    from matplotlib.figure import Figure

    from poise.reports import plot_style, plots, run_plots, study_plots

    def digest(figure: Figure) -> str:
        shown = [
            (ax.get_title(loc="left"), [(line.get_label(), line.get_xydata().tolist()) for line in ax.lines])  # type: ignore[attr-defined]
            for ax in figure.axes
        ]
        return hashlib.sha256(repr(shown).encode()).hexdigest()

    def svg(figure: Figure, identifier: str) -> str:
        return f'<svg id="{identifier}" data-shown="{digest(figure)}"></svg>'

    def save_png(figure: Figure, path: str | Path) -> None:
        Path(path).write_text(digest(figure))

    with pytest.MonkeyPatch.context() as patch:
        for module in (plot_style, plots, run_plots, study_plots):
            for stand_in in (svg, save_png):
                if hasattr(module, stand_in.__name__):
                    patch.setattr(module, stand_in.__name__, stand_in)
        yield


undrawn = pytest.fixture(scope="module")(_undrawn)  # for all tests of a module and its fixtures
undrawn_here = pytest.fixture(_undrawn)  # for one test


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    forked.stop_all()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache, nor do the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session", params=["llama", "qwen3", "gpt2"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def preferences_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs in which a good word beats a bad one."""
    import json
    import random

    generator = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    rows = []
    for i in range(40):
        filler = " ".join(generator.choices(WORDS[4:], k=4))
        good, bad = generator.choice(["good", "great", "fine"]), generator.choice(["bad", "awful", "poor"])
        prompt = "Review a film." if i % 2 else [{"role": "user", "content": "Review a phone."}]
        rows.append({"prompt": prompt, "chosen": f"{filler} {good} {i}", "rejected": f"{filler} {bad} {i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def train_tiny_reward(preferences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A `poise train-reward` run folder of a given tiny model."""
    from poise.reward import train as train_reward

    def train(model: str) -> Path:
        output = str(tmp_path_factory.mktemp("run") / "reward")
        config = train_reward.Config(
            preferences=str(preferences_file),
            output=output,
            model=model,
            num_layers=2,
            trunk="frozen",
            posterior_heads=6,
            head_steps=60,
        )
        return train_reward.run(config).folder

    return train


@pytest.fixture(scope="session")
def watched_reward(tiny_model: str, preferences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `poise train-reward` run folder with a validator of its own."""
    from poise.reward import train as train_reward

    config = train_reward.Config(
        preferences=str(preferences_file), output=str(tmp_path_factory.mktemp("run") / "watched"), model=tiny_model,
        num_layers=1, trunk="frozen", posterior_heads=6, head_steps=30, validator_share=0.4,
    )  # fmt: skip
    return train_reward.run(config).folder


@pytest.fixture(scope="module")
def reward_folder(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    """A run folder that the tests of a module share."""
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "Review the {thing}."}}\n' for thing in ("film", "phone", "pan", "kettle")))
    return path
