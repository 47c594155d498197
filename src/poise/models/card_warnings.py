"""The warnings on a model's card, for whoever is about to use the model. Imports nothing heavy."""

import re
from pathlib import Path

from poise.runtime.display import on_one_line
from poise.runtime.records import parse_json

_QUOTED = re.compile(r"^> (\*\*.*)$", re.MULTILINE)


def card_warnings(path: str | Path) -> list[str]:
    """Warnings on the card of a local reward model, ensemble, policy or run of one; [] if there is no card.

    A card warns in block quotes that begin in bold. A hub id is not looked up.
    """
    folder = Path(path)
    for inner in ("brme", "policy"):
        if not (folder / "config.json").exists() and (folder / inner / "README.md").exists():
            folder = folder / inner
    try:
        members = parse_json((folder / "ensemble.json").read_text(encoding="utf-8"))["members"]
        return list(dict.fromkeys(warning for name in members for warning in card_warnings(folder / str(name))))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return [on_one_line(re.sub(r"\*\*|`", "", found)).replace(" %", "\xa0%") for found in _QUOTED.findall(text)]
