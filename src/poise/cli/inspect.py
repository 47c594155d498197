"""`poise inspect`: what a reward model says of completions that are typed or piped in, head by head."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.runtime.display import on_one_line
from poise.runtime.settings import LengthOrAll, Reward, Settings

if TYPE_CHECKING:
    from poise.models.scorer import Scorer

_SHOWN_HEADS = 8


@dataclass(frozen=True)
class Config(Settings):
    """Type a prompt and completions, and see every head's reward, the uncertainties, and what truncation did.

    From a pipe: JSON lines of `prompt`, `completion`, or plain text, whose first line is the prompt and whose other
    lines are completions of it.
    """

    reward: Annotated[tyro.conf.Positional[Reward], tyro.conf.arg(metavar="REWARD")]
    """Reward model: checkpoint folder, hub id, `poise train-reward` run, or an ensemble."""
    max_length: LengthOrAll = 0
    """Longest sample in tokens; longer ones lose their oldest tokens. 0: the model's context."""


def run(config: Config) -> None:
    """Answer until the input ends. PoiseError for a pipe that holds no completion."""
    samples = None if sys.stdin.isatty() else list(_piped(sys.stdin.read().splitlines()))
    if samples == []:
        raise PoiseError("nothing to score: the first line is the prompt, each other line a completion of it")
    from poise.models.scorer import Scorer  # imports torch

    scorer = Scorer.load(config.reward, config.max_length)
    if samples is None:
        _converse(scorer)
    for sample in samples or ():
        print(as_text(describe(scorer, sample)), flush=True)


def describe(scorer: "Scorer", sample: Sample) -> dict[str, Any]:
    """What the reward model says of one completion, as plain values."""
    from poise.functional import objectives
    from poise.models.chat_format import encode_conversation

    tokenizer, longest = scorer.extract.tokenizer, scorer.extract.max_length
    prompt, completion = encode_conversation(tokenizer, sample.prompt, sample.completion)
    ids = [*prompt, *completion]
    lost = max(len(ids) - longest, 0)
    heads = scorer([sample])
    found: dict[str, Any] = {
        "completion": sample.completion, "tokens": len(ids), "lost": lost,
        "lost_text": tokenizer.decode(ids[:lost]) if lost else "",
        "mean": heads.mean[0].tolist(), "std": heads.std[0].tolist(),
        "average": objectives.mean(heads).item(), "worst_case": objectives.worst_case(heads).item(),
    }  # fmt: skip
    if scorer.layout.kind == "gaussian":
        found |= {
            "nominal_head": int(objectives.nominal_head(heads).item()),
            "routing_std": objectives.routing_std(heads).item(),
            "total_std": objectives.total_std(scorer.layout.calibrated(heads)).item(),
        }
    if scorer.layout.num_heads > 1:
        found["disagreement"] = objectives.disagreement(heads).item()
    if scorer.last_layer is not None:
        found["last_layer_std"] = scorer.last_layer.std(scorer.extract([sample]))[0].item()
    return found


def as_text(found: dict[str, Any]) -> str:
    """One completion's scores for a terminal."""
    lines = [f"completion {on_one_line(found['completion'])!r}"]
    chosen = found.get("nominal_head")
    for k, (mean, std) in enumerate(zip(found["mean"], found["std"], strict=True)):
        if k == _SHOWN_HEADS and len(found["mean"]) > _SHOWN_HEADS + 1:
            lines.append(f"  … {len(found['mean']) - k} more heads")
            break
        around = f" ± {std:.3f}" if chosen is not None else ""
        lines.append(f"  head {k:<3} {mean:+.3f}{around}{'  nominal: the lowest std' if k == chosen else ''}")
    for name in ("average", "worst_case", "disagreement", "routing_std", "total_std", "last_layer_std"):
        if name in found:
            lines.append(f"  {name:<15} {found[name]:+.3f}")
    lines.append(f"  tokens          {found['tokens']}")
    if found["lost"]:
        lines.append(f"  truncated       the oldest {found['lost']} tokens: {on_one_line(found['lost_text'])[:200]!r}")
    return "\n".join(lines)


def _converse(scorer: "Scorer") -> None:
    print("Type a prompt, then completions of it. An empty line asks for another prompt; Ctrl-D ends.")
    while True:
        try:
            prompt = input("prompt> ")
            while prompt.strip() and (text := input("completion> ")).strip():
                print(as_text(describe(scorer, Sample(prompt, text))))
        except EOFError:
            print()
            return


def _piped(lines: list[str]) -> Iterator[Sample]:
    """Samples of JSON lines, or of plain text. PoiseError, with the line's number, for one that cannot be read."""
    from poise.data.files import as_object
    from poise.data.other_forms import one_by_one
    from poise.data.preferences import sample_of

    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if filled and not filled[0][1].lstrip().startswith("{"):
        prompt: Prompt = filled[0][1]
        yield from (Sample(prompt, line) for _, line in filled[1:])
        return
    for number, line in filled:
        try:
            samples = [sample_of(one) for one in one_by_one(as_object(line))]
        except ValueError as error:
            raise PoiseError(f"line {number} of the input: {error}") from None
        yield from samples
