"""docs/robustness.md names tests that exist; docs/licences.md has every package of requirements.lock."""

import re
from pathlib import Path

import licences

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_table_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        found = re.search(r"`(tests/\S+\.py)::(\w+)` \|$", row)
        assert found, row
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), row


def test_every_package_has_a_licence() -> None:
    listed = set(re.findall(r"^\| (\S+) \| .+ \|$", licences.PAGE.read_text(), re.MULTILINE)) - {"Package"}
    assert listed == set(licences.pins())
