"""The chat templates of well-known model families, as TRL ships them, and tokenizers that have their markers."""

import re
from pathlib import Path

import transformers
import trl

from conftest import make_tokenizer

TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
DROP_PLAIN_TEXT = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}
PROMPTS = (
    "Pick a letter.",
    [
        {"role": "user", "content": "Is tea hot?"},
        {"role": "assistant", "content": "<think>\nTea.\n</think>\n\nMostly."},
        {"role": "user", "content": "a"},
    ],
)
PLAIN_TEXTS = sorted(TEMPLATES.keys() - DROP_PLAIN_TEXT)
MARKER = re.compile(r"</?[|｜]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]|<[|｜]\w+>|<\w+[|｜]>")


def family_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose added tokens are the markers of a stock template, as those of its model family are."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    found = sorted({*MARKER.findall(TEMPLATES[name]), *MARKER.findall(rendered)} - {"<x>"})
    tags = [text for text in found if {text.replace("</", "<"), text.replace("<", "</")} & {*found} - {text}]
    tokenizer.add_tokens([text for text in found if text not in tags], special_tokens=True)
    tokenizer.add_tokens(tags)  # think and tool blocks, which are no special tokens in their families
    return tokenizer
