"""Write results/README.md, a table of every result, from results/index.yaml.

    python experiments/index_results.py

It refuses an index that leaves out a result, names one that is not there, or whose command names no script of this
repository or another one than the result itself recorded.
"""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FIELDS = {"what", "command", "claim"}
NOTE = "note"  # what else a reader must know; not every result has one
NOT_RESULTS = {"README.md", "index.yaml"}
HEAD = """# Results

Measured numbers, raw, with the command that made each and the claim it backs. Failures are among them.
`python experiments/index_results.py` makes this page of [index.yaml](index.yaml).

| result | date | what | command | claim |
|---|---|---|---|---|
"""


def results() -> dict[str, Path]:
    """Name -> file or folder."""
    return {path.name.removesuffix(".json"): path for path in RESULTS.iterdir() if path.name not in NOT_RESULTS}


def recorded(path: Path) -> str:
    """The script or command that the result says it was made by; "" if it does not."""
    source = path / "environment.json" if path.is_dir() else path
    content = json.loads(source.read_text())
    environment = content if path.is_dir() else content.get("environment", {})
    return next(iter(environment.get("command", [])), "")


def faults(index: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with the index, a line each."""
    there = results()
    found = [f"{name} is not in index.yaml" for name in sorted(there.keys() - index.keys())]
    found += [f"index.yaml names {name}, which is not there" for name in sorted(index.keys() - there.keys())]
    for name in sorted(index.keys() & there.keys()):
        entry = index[name]
        if entry.keys() - {NOTE} != FIELDS or not all(entry.values()):
            found.append(f"{name} needs {', '.join(sorted(FIELDS))} and nothing else")
            continue
        if not re.search(r"\d{4}-\d\d-\d\d$", name):
            found.append(f"{name} does not end in a date")
        scripts = re.findall(r"[\w/.-]+\.py\b", entry["command"])
        found += [f"{name}: there is no {script}" for script in scripts if not (ROOT / script).is_file()]
        if not scripts and not re.search(r"\b(poise|make) ", entry["command"]):
            found.append(f"{name}: the command names no script and no poise command")
        made_by = recorded(there[name])
        if made_by and made_by not in {Path(script).name for script in scripts} | {"poise"}:
            found.append(f"{name}: made by {made_by}, says the result")
    return found


def page(index: dict[str, dict[str, str]]) -> str:
    """The README."""
    there, rows = results(), []
    for name in sorted(index):
        entry = {field: " ".join(text.split()).replace("|", "\\|") for field, text in index[name].items()}
        command = entry["command"]
        if "`" not in command:
            command = f"`{command}`"
        claim = f"{entry['claim']} *{entry[NOTE]}*" if NOTE in entry else entry["claim"]
        title, date = name[:-11], name[-10:]
        rows.append(f"| [{title}]({there[name].name}) | {date} | {entry['what']} | {command} | {claim} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    index = yaml.safe_load((RESULTS / "index.yaml").read_text())
    if found := faults(index):
        raise SystemExit("\n".join(found))
    (RESULTS / "README.md").write_text(page(index))


if __name__ == "__main__":
    main()
