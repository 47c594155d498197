"""Text that is not ours, made safe to show: in the terminal, on pages and in model cards."""

import re
import sys
from typing import Any

# Control characters but tab and line feed; marks that reorder or hide text; line separators; lone surrogates.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKUP = re.compile(r"([\\`*_\[\]<>|])")


def visible(text: str) -> str:
    r"""The text with an escape in place of every character that is not seen, or that changes how others are seen.

    >>> visible("a\x1b[31m\u202eb\x00\ud800")
    'a\\x1b[31m\\u202eb\\x00\\ud800'
    """
    return _INVISIBLE.sub(lambda found: _escaped(ord(found[0])), text)


def on_one_line(text: str) -> str:
    """`visible`, with escapes for line feeds and tabs too: for messages and names.

    >>> on_one_line("a\\nb")
    'a\\\\nb'
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def markdown_text(text: str) -> str:
    r"""A name as plain text of a Markdown page: no markup or HTML in it is read as such.

    >>> markdown_text("a_b<i>.jsonl")
    'a\\_b\\<i\\>.jsonl'
    """
    return _MARKUP.sub(r"\\\1", on_one_line(text))


def markdown_code(text: str) -> str:
    """A name in code marks of a Markdown page, longer marks where the name holds some itself.

    >>> markdown_code("a`b")
    '`` a`b ``'
    """
    shown = on_one_line(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    return f"`{shown}`" if not longest else f"{'`' * (longest + 1)} {shown} {'`' * (longest + 1)}"


def visible_values(value: Any) -> Any:
    """JSON values with every text, keys included, made `visible`."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key) if isinstance(key, str) else key: visible_values(one) for key, one in value.items()}
    return [visible_values(one) for one in value] if isinstance(value, (list, tuple)) else value


def say(text: str) -> None:
    """One line on stderr. A stderr that is closed or full loses the line, not the work."""
    try:
        print(on_one_line(text), file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        return


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
