"""Text that spells a chat template's markers, such as `<|im_end|>`, is encoded as text: it begins and ends no turn.

A tokenizer cannot tell the marker that the template wrote from one that a user or a policy wrote. So the texts of the
turns are rendered with their markers hidden: each is one private character. Then every marker in the rendering is the
template's own. What the model reads is unchanged for texts without markers.
"""

import functools
import json
import re
from collections.abc import Callable, Collection
from typing import Any

from tokenizers import AddedToken, Tokenizer

from poise.errors import PoiseError

# Hugging Face objects resolve their attributes at run time; a type checker could only guess at them.
HfTokenizer = Any

# Private characters (Unicode planes 15 and 16): one for each marker in a turn's text, and one for each of the template.
_HIDDEN, _OWN = 0xF0000, 0x100000
_HIDDEN_ONES, _PRIVATE = re.compile("[\U000f0000-\U000fffff]"), re.compile("[\U000f0000-\U0010ffff]")
_OF_AN_ANSWER = re.compile(r"tool.?call|^\[(/?THINK|CALL_ID|ARGS)\]$", re.IGNORECASE)  # in brackets: Mistral's


class Markers:
    """The markers of a tokenizer and its chat template, and the encoding of texts that spell them.

    rendered: what the template writes for a plain conversation.
    """

    def __init__(self, tokenizer: HfTokenizer, rendered: str):
        self.tokenizer = tokenizer
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if str(token)}
        named = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        written = {text for text in added if text in tokenizer.chat_template or text in rendered} | named
        # Think and tool blocks are parts of an answer: the model is to read them as the tokens that they are.
        inside = {text for text in written - named if _inside(text, added)}
        self.ids = {text: added.get(text, tokenizer.convert_tokens_to_ids(text)) for text in sorted(written - inside)}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._number = {text: i for i, text in enumerate(self.ids)}
        self._texts = list(self.ids)

    def first_in(self, turns: list[dict[str, Any]]) -> str | None:
        """A marker that the texts of the turns spell; None if they spell none."""
        found = (self._pattern.search(text) for turn in turns for text in _texts(turn))
        return next((match[0] for match in found if match), None)

    def hide(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns, each marker in their texts replaced by one private character."""
        marker = self.first_in(turns)
        if marker and any(_PRIVATE.search(text) for turn in turns for text in _texts(turn)):
            raise PoiseError(f"a text holds the marker {marker!r} beside private-use characters; take one of them out")
        return [_mapped(turn, self._hidden) for turn in turns]

    def show(self, hidden: str) -> str:
        """A rendering of hidden turns with their markers spelled out."""
        return _HIDDEN_ONES.sub(lambda match: self._texts[ord(match[0]) - _HIDDEN], hidden)

    def encode(self, hidden: str) -> list[int]:
        """Token ids of a rendering of hidden turns: the template's markers as tokens, those in the texts as text.

        Raises PoiseError if the tokenizer has no other way to write a marker than its token.
        """
        own = self._pattern.sub(lambda match: chr(_OWN + self._number[match[0]]), hidden)
        ids: list[int] = self._backend.encode(self.show(own), add_special_tokens=False).ids
        taken = set(self.ids.values())
        for i, token in enumerate(ids):
            if token in taken:
                text = next(text for text, number in self.ids.items() if number == token)
                raise PoiseError(f"a text spells the chat template's marker {text!r}, which would end or begin a turn")
            ids[i] = self._own_id.get(token, token)
        return ids

    def _hidden(self, text: str) -> str:
        return self._pattern.sub(lambda match: chr(_HIDDEN + self._number[match[0]]), text)

    @functools.cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer with its markers plain text, and a private character for each that means the token."""
        if not self.tokenizer.is_fast:
            raise PoiseError(
                f"a text spells a marker of the chat template, such as {self._texts[0]!r}, and this kind of tokenizer "
                f"cannot encode a marker as text; take it out"
            )
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        alias = []
        for token in state["added_tokens"]:
            # Special tokens are what `encode_special_tokens` makes plain text, so here these are the markers.
            token["special"] = token["content"] in self.ids
            if token["special"]:
                flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized")}
                alias.append(AddedToken(chr(_OWN + self._number[token["content"]]), special=False, **flags))
        backend = Tokenizer.from_str(json.dumps(state))
        backend.encode_special_tokens = True
        backend.add_tokens(alias)
        return backend

    @functools.cached_property
    def _own_id(self) -> dict[int, int]:
        """Token of a private character -> token of the marker that it stands for."""
        found = {self._backend.token_to_id(chr(_OWN + self._number[text])): i for text, i in self.ids.items()}
        return {alias: i for alias, i in found.items() if alias is not None}


def tokens_of_answers(tokenizer: HfTokenizer) -> tuple[set[int], set[int]]:
    """(special tokens, those of them that are parts of an answer: think and tool blocks)."""
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    names = set(tokenizer.get_added_vocab())
    return {*special, *tokenizer.all_special_ids}, {
        i for i, text in special.items() if text not in named and _inside(text, names)
    }


def _inside(text: str, added: Collection[str]) -> bool:
    """Is an added token a part of an answer: one of a pair of tags, or of the call of a tool?"""
    return _twin(text) in added or _OF_AN_ANSWER.search(text) is not None


def _twin(text: str) -> str:
    """`</x>` for `<x>` and the other way round; "" for what is no tag."""
    tag = re.fullmatch(r"<(/?)([^<>|/]+)>", text)
    return f"<{'' if tag[1] else '/'}{tag[2]}>" if tag else ""


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A turn with its texts changed; the role and the names of fields stay."""
    if isinstance(value, dict):
        return {name: part if name in ("role", "type") else _mapped(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _texts(turn: dict[str, Any]) -> list[str]:
    found: list[str] = []
    _mapped(turn, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found
