"""docs/robustness.md names tests that exist; docs/licences.md has every package of requirements.lock."""

import ast
import re
from pathlib import Path
from typing import Any

import licences

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_table_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        found = re.search(r"`(tests/\S+\.py)::(\w+)` \|$", row)
        assert found, row
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), row


def constant(file: str, name: str) -> Any:
    """The literal value that a test module gives a name; the module is not imported."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    [value] = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return ast.literal_eval(value)


def test_the_kill_points_are_counted() -> None:
    points = {
        "commands": sum(constant("test_kills.py", "LEAST").values()),
        "policies": len(constant("policy/test_train.py", "BOUNDARIES")),
        "studies": constant("studies/test_study_kills.py", "BOUNDARIES")
        + len(constant("studies/test_study_kills.py", "IN_JOBS")),
    }
    said = re.search(
        r"^Kill points: (\d+) \((\d+) of single commands, (\d+) of a policy's training .*, (\d+) of a study\)",
        (ROOT / "docs" / "robustness.md").read_text(),
        re.MULTILINE,
    )
    assert said
    assert list(map(int, said.groups())) == [sum(points.values()), *points.values()]


def test_every_package_has_a_licence() -> None:
    listed = set(re.findall(r"^\| (\S+) \| .+ \|$", licences.PAGE.read_text(), re.MULTILINE)) - {"Package"}
    assert listed == set(licences.pins())


def test_every_package_but_torch_has_hashes() -> None:
    blocks = re.split(r"\n(?=\w)", licences.LOCKS[0].read_text().partition("\nabsl")[2])
    assert len(blocks) > 100
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", block.strip()) for block in blocks)
    assert set(licences.pins()) - {"torch"} == {
        line.partition("==")[0] for line in licences.LOCKS[0].read_text().splitlines() if re.match(r"\w.*==", line)
    }
