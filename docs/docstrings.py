"""How docstrings become pages: examples as code, and lines that describe an argument as a list."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes what mkdocstrings renders, not the docstrings themselves."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every module, class and function that is read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring as Markdown.

    >>> print(as_markdown("Sum.\\n\\nx: (N,) the terms.\\n\\n>>> total([1])\\n1"))
    Sum.
    <BLANKLINE>
    - `x`: (N,) the terms.
    <BLANKLINE>
    ```pycon
    >>> total([1])
    1
    ```
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.lstrip().startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
        elif not block.startswith("    "):
            blocks.append(re.sub(r"^(\w+(?:, \w+)*):(?= )", r"- `\1`:", block, flags=re.MULTILINE))
        else:
            blocks.append(block)
    return "\n\n".join(blocks)
