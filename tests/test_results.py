"""Every result is listed, with a command that exists; what is checked can fail."""

import importlib.util
import json
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def indexing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("index_results", ROOT / "experiments" / "index_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def index() -> dict[str, dict[str, str]]:
    return yaml.safe_load((RESULTS / "index.yaml").read_text())


def test_every_result_is_listed_and_every_script_exists(indexing: ModuleType, index: dict[str, dict[str, str]]) -> None:
    assert indexing.faults(index) == []


def test_the_page_is_made_of_the_index(indexing: ModuleType, index: dict[str, dict[str, str]]) -> None:
    assert (RESULTS / "README.md").read_text() == indexing.page(index), "run python experiments/index_results.py"


def test_every_json_parses() -> None:
    files = list(RESULTS.rglob("*.json"))
    assert files
    for path in files:
        json.loads(path.read_text())


def test_faults_are_found(indexing: ModuleType, index: dict[str, dict[str, str]]) -> None:
    broken = deepcopy(index)
    del broken["killed-2026-11-24"]
    broken["never-2026-11-24"] = broken["routing-2026-11-24"]
    broken["hh-rlhf-2026-11-24"]["command"] = "python experiments/no_such.py"
    broken["train-heads-2026-11-24"]["command"] = "python benchmarks/train_trunk.py"
    broken["toy-2026-11-24"]["command"] = "by hand"
    broken["lambada-2026-11-25"]["claim"] = ""
    assert indexing.faults(broken) == [
        "killed-2026-11-24 is not in index.yaml",
        "index.yaml names never-2026-11-24, which is not there",
        "hh-rlhf-2026-11-24: there is no experiments/no_such.py",
        "hh-rlhf-2026-11-24: made by hh_rlhf.py, says the result",
        "lambada-2026-11-25 needs claim, command, what and nothing else",
        "toy-2026-11-24: the command names no script and no poise command",
        "train-heads-2026-11-24: made by train_heads.py, says the result",
    ]
