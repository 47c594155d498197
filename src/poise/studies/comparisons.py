"""What `poise choose` compares: a ladder of completions by KL, and blind pairs drawn from it. Needs no torch."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from poise.data.preferences import sample_of
from poise.data.rows import read_rows
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.runtime.records import Json


def prompt_key(prompt: Prompt) -> str:
    """The whole prompt as text, as a key."""
    return json.dumps(prompt, sort_keys=True)


def read_ladder(path: str) -> list[Json]:
    """Rows of prompt, completion and kl."""

    def parse(row: dict[str, Any]) -> Json:
        sample, kl = sample_of(row), row.get("kl")
        if not isinstance(kl, (int, float)) or isinstance(kl, bool) or not (math.isfinite(kl) and kl >= 0):
            raise ValueError("'kl' must be the rung's KL to the start in nats, and 0 for the start's own texts")
        return {"prompt": sample.prompt, "completion": sample.completion, "kl": float(kl)}

    return read_rows(path, parse)


def draw(rows: Sequence[Json], per_rung: int, seed: int) -> tuple[list[Json], Json]:
    """(comparisons, key): of each rung as many completions as asked for, over as many prompts as there are.

    Each stands beside a completion of the rung below for the same prompt, where that has enough of the same prompts,
    and else beside one of the start. Sides and order are random.
    """
    rng = random.Random(seed)
    kls = sorted({row["kl"] for row in rows} | {0.0})
    points: list[dict[str, list[str]]] = [{} for _ in kls]
    prompts: dict[str, Prompt] = {}
    for row in rows:
        key = prompt_key(row["prompt"])
        points[kls.index(row["kl"])].setdefault(key, []).append(row["completion"])
        prompts[key] = row["prompt"]
    if len(kls) == 1 or not points[0]:
        raise PoiseError("there must be completions of the start, with kl 0, and of at least one rung, with its kl")
    drawn: list[tuple[Json, Json]] = []
    for number in range(1, len(kls)):
        beside = number - 1 if _shared(points[number], points[number - 1]) >= per_rung else 0
        if (enough := _shared(points[number], points[beside])) < per_rung:
            raise PoiseError(
                f"the rung of KL {kls[number]:g} has {enough} completions of prompts that the start answered, too; "
                f"--per-rung is {per_rung}"
            )
        own = [(key, text) for key, texts in points[number].items() if key in points[beside] for text in texts]
        rng.shuffle(own)
        seen: Counter[str] = Counter()
        turn = []  # every prompt's first completion comes before any prompt's second
        for key, text in own:
            turn.append((seen[key], key, text))
            seen[key] += 1
        for _, key, text in sorted(turn, key=lambda one: one[0])[:per_rung]:
            texts, side = (text, rng.choice(points[beside][key])), rng.randrange(2)
            shown = {"prompt": prompts[key], "a": texts[side], "b": texts[1 - side]}
            drawn.append((shown, {"policy": "ab"[side], "rung": number - 1, "beside": beside}))
    rng.shuffle(drawn)
    return (
        [{"id": number, **shown} for number, (shown, _) in enumerate(drawn)],
        {"kl": kls[1:], "sides": [side for _, side in drawn]},
    )


def _shared(rung: dict[str, list[str]], other: dict[str, list[str]]) -> int:
    """Completions of a rung whose prompts the other point answered, too."""
    return sum(len(texts) for key, texts in rung.items() if key in other)
