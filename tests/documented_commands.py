"""The commands of docs/start/engines.md, for the tests that give them to each engine's own option parser."""

import ast
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "start" / "engines.md"


def documented(heading: str, page: Path = PAGE) -> list[str]:
    """The words of the last command in the section whose title begins so; a shell's insertions are `inserted.py`."""
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(heading)]
    *_, block = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    *_, command = block.replace("\\\n", " ").strip().splitlines()
    return shlex.split(re.sub(r"\$\(.*?\"\)|\"\$\{.*?\}\"", "inserted.py", command))


def run_main(source: Path, options: list[str], until: str, **names: Any) -> Any:
    """`args` of a module's `if __name__ == "__main__"`, run on these options up to the call of `until`.

    The module's own imports, of packages that need a GPU, are left out; names: what that block takes from them.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    calls = [ast.unparse(node).startswith(f"{until}(") for node in block.body]
    body = ast.Module(block.body[: calls.index(True)], type_ignores=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(source), *options])
        exec(compile(body, str(source), "exec"), names)
    return names["args"]
