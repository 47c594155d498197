"""How long a text may be for a model, as its config says."""

import sys
from typing import Any

from poise.errors import PoiseError


def context_length(config: Any) -> int:
    """The longest text in tokens that a model has positions for; a very large number if it has no such limit."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0  # MPT's
    return limit if limit > 0 else sys.maxsize  # XLNet's is -1


def steady_context_length(config: Any) -> int:
    """The longest text in tokens whose hidden states do not depend on how long the other texts of its batch are.

    This is the whole context, except with rotary positions of the type `longrope` (Phi-3 128k): where the longest text
    of a batch exceeds `original_max_position_embeddings`, they are computed in another way for the whole batch. Those
    of the type `dynamic` change beyond `max_position_embeddings` alone.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one, or one for each kind of layer
    switches = [
        kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for kind in kinds
        if "longrope" in (kind.get("rope_type"), kind.get("type"))
    ]
    return min([context_length(config), *(switch for switch in switches if switch)])


def room_or_raise(longest: int, max_tokens: int, config: Any) -> None:
    """Raise PoiseError if a prompt of `longest` tokens leaves no room for `max_tokens` new ones."""
    steady = steady_context_length(config)
    if longest + max_tokens > steady:
        limit = f"the model's context of {steady}"
        if steady < context_length(config):
            limit = f"the {steady} tokens beyond which longrope changes the positions of a whole batch"
        raise PoiseError(
            f"a prompt of {longest} tokens and {max_tokens} new ones exceed {limit}; shorten the prompt or --max-tokens"
        )
