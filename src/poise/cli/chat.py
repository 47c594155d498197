"""`poise chat`: a conversation with a trained policy, in a terminal or through a pipe."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from poise.data.conversations import check_text
from poise.errors import PoiseError
from poise.runtime.display import visible
from poise.runtime.run_kinds import why_without
from poise.runtime.settings import Count, PolicyModel, Seed, Settings, between


@dataclass(frozen=True)
class Config(Settings):
    """Talk with a policy: the language model with its adapters, sampled as it was trained.

    In a terminal `/new` begins another conversation, and Ctrl-D ends. From a pipe each line is a turn of one
    conversation, and the answers go to standard output.
    """

    policy: Annotated[tyro.conf.Positional[PolicyModel], tyro.conf.arg(metavar="POLICY")]
    """Policy: a `poise train-policy` run, the `policy` folder in it, or any language model (folder or hub id)."""
    system: str = ""
    """System turn to begin with."""
    max_tokens: Count = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, between(0, 10)] = 1.0
    """1 samples as in training; 0 always takes the most probable token."""
    seed: Seed = 0
    """Of the sampling."""

    def check(self) -> None:
        """As `Settings.check`, and that the system turn is Unicode."""
        super().check()
        _refuse_halves(self.system, "--system")


def run(config: Config) -> None:
    """Answer until the input ends."""
    policy = Talker(config)
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ctrl-D ends, /new begins anew.")
    for text in _lines(terminal):
        if text.strip() == "/new":
            policy.begin()
        elif text.strip():
            print(visible(policy.answer(text)), flush=True)


class Talker:
    """A policy and the conversation so far."""

    def __init__(self, config: Config):
        import torch
        import transformers

        from poise.models.end_tokens import plain_generation

        self.config = config
        self.model, self.tokenizer = _load(config.policy)
        self.model.generation_config = plain_generation(self.model, self.tokenizer)
        if self.tokenizer.chat_template is None and config.system:
            raise PoiseError("--system needs a model with a chat template")
        transformers.set_seed(config.seed)
        self._torch = torch
        self.begin()

    def begin(self) -> None:
        """Forget the conversation."""
        self.turns: list[dict[str, Any]] = []
        if self.config.system:
            self.turns.append({"role": "system", "content": self.config.system})

    def answer(self, text: str) -> str:
        """The policy's next turn. A model without a chat template goes on from the text alone.

        Raises PoiseError once the conversation does not fit the model's context.
        """
        from poise.models.chat_format import decode_completions, encode_prompt
        from poise.models.context import context_length
        from poise.models.loading import embedded_or_raise

        _refuse_halves(text, "the text")
        templated = self.tokenizer.chat_template is not None
        self.turns.append({"role": "user", "content": text})
        ids = encode_prompt(self.tokenizer, self.turns if templated else text)
        embedded_or_raise(ids, self.model.get_input_embeddings().num_embeddings, self.tokenizer)
        room = context_length(self.model.config.get_text_config()) - len(ids)
        if room < 1:
            raise PoiseError(f"the conversation is longer than the model's context by {1 - room} tokens; begin anew")
        sampled = self.config.temperature > 0
        how: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            how |= {"temperature": self.config.temperature, "top_k": 0, "top_p": 1.0}
        with self._torch.no_grad():
            given = self._torch.tensor([ids], device=self.model.device)
            written = self.model.generate(
                given, attention_mask=self._torch.ones_like(given),
                max_new_tokens=min(self.config.max_tokens, room), **how,
            )  # fmt: skip
        said = decode_completions(self.tokenizer, ids, [written[0, len(ids) :].tolist()])[0]
        self.turns.append({"role": "assistant", "content": said})
        return said


def _refuse_halves(text: str, what: str) -> None:
    try:
        check_text(text, what)
    except ValueError as error:
        raise PoiseError(str(error)) from None


def _load(policy: str) -> tuple[Any, Any]:
    from poise.models.loading import load_policy
    from poise.policy.formats import policy_in
    from poise.policy.merge import unfolded

    folder = Path(policy_in(policy))
    if (folder / "adapter_config.json").exists():
        return unfolded(folder)
    if not (folder / "config.json").exists() and (folder / "config.yaml").exists():
        raise PoiseError(f"{policy} has no policy: {why_without(folder, 'policy')}")
    return load_policy(str(folder))


def _lines(terminal: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
