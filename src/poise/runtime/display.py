"""Text that is not ours, made safe to show: in the terminal, on pages and in model cards."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Control characters but tab and line feed; marks that reorder or hide text; line separators; lone surrogates.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


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


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path; the whole path where two would be called the same.

    >>> short_names(["runs/a/single", "runs/b/single", "runs/b/brme"])
    ['runs/a/single', 'runs/b/single', 'brme']
    """
    short = [Path(path).name for path in paths]
    return [name if name and short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def markdown_code(text: str) -> str:
    """A name in code marks of a Markdown page: no markup or HTML in it is read as such.

    >>> markdown_code("<b>a`b")
    "`<b>a'b`"
    """
    return f"`{on_one_line(text).replace('`', chr(39))}`"


def markdown_cell(text: str) -> str:
    r"""The text of a table's cell: a bar in it does not end the cell.

    >>> markdown_cell("`a|b`")
    '`a\\|b`'
    """
    return text.replace("|", r"\|")


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
