"""The chat templates that TRL and transformers ship, and tokenizers that have their markers.

TRL has them as files. transformers has three in its Python. Its other templates there, in `decision` and `models/jev`,
are of decisions: they read a state, and no messages.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import transformers
import trl

from conftest import make_tokenizer


def in_python() -> Iterator[tuple[str, str]]:
    """(name, template) of the chat templates that are strings in the modules of transformers; nothing is imported."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name.startswith("modular_") or "{%" not in text or "message" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            found = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if "{%" in found and "messages" in found:
                yield f"transformers_{path.parent.name}", found


TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
IN_PYTHON = dict(in_python())
TEMPLATES |= IN_PYTHON
DROP_PLAIN_TEXT = {
    "transformers_smolvlm",
    "idefics3",
    "idefics3_training",
    "llava_next",
    "llava_next_training",
    "smolvlm",
    "smolvlm_training",
}
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
