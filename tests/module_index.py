"""docs/modules.md: every module of the package with the first sentence of its docstring.

python tests/module_index.py      # writes it anew
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "poise"
PAGE = ROOT / "docs" / "modules.md"
ROOMS = (
    "runtime", "functional", "data", "models", "toy", "serve", "integrations", "reward", "policy", "reports", "api",
    "studies", "cli",
)  # fmt: skip

HEADER = """# Modules

The package is a house of rooms. A room imports from the rooms above it in this list, never from those below;
`functional` and `data` do not import each other, nor do `models` and `toy`, nor `reward` and `policy`
(tests/test_layers.py). This page is written by `python tests/module_index.py`, from the modules' own docstrings.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEADER, "- [`errors.py`](../src/poise/errors.py): " + summary(PACKAGE / "errors.py") + "\n"]
    for room in ROOMS:
        files = sorted(path for path in (PACKAGE / room).glob("*.py") if not path.name.startswith("__"))
        if files:
            lines = [f"- [`{path.name}`](../src/poise/{room}/{path.name}): {summary(path)}" for path in files]
            parts.append(f"## {room}\n\n{summary(PACKAGE / room / '__init__.py')}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
