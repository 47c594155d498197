"""Benchmarks, experiments and examples are run by hand, years apart: what they import must be there when they are."""

import ast
import importlib
import importlib.util
import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path for folder in ("benchmarks", "experiments", "examples", "docs") for path in ROOT.glob(f"{folder}/*.py")
)
SCRIPTS += sorted((ROOT / "tests" / "gpu").glob("*.py")) + sorted((ROOT / "tests" / "engines").glob("*/*.py"))
# Modules that import an engine, which is not installed here; tests/engines runs them.
ENGINES = ("molt_env", "ms_swift_reward", "ray_serve", "skyrl_env", "verl_manager")
OF_ENGINES = {f"poise.integrations.{name}" for name in ENGINES}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_imports_names_that_exist(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("poise"):
            continue
        assert node.module
        if node.module in OF_ENGINES:
            continue
        module = importlib.import_module(node.module)
        for name in node.names:
            whole = f"{node.module}.{name.name}"
            if not hasattr(module, name.name) and (
                not hasattr(module, "__path__") or importlib.util.find_spec(whole) is None
            ):
                missing.append(whole)
    assert missing == []


def test_prompts_become_rows_that_other_engines_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "mine.jsonl", tmp_path / "data" / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi — “you”."}]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Is tea hot?", turns)))
    monkeypatch.setattr(sys, "argv", ["engine_prompts.py", str(source), str(target)])
    runpy.run_path(str(ROOT / "examples" / "engine_prompts.py"), run_name="__main__")
    rows = load_dataset("json", data_files=str(target), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    asked = [[{"role": "user", "content": "Is tea hot?"}], turns]
    assert [row["prompt"] for row in rows] == [row["messages"] for row in rows] == asked
    assert {row["data_source"] for row in rows} == {"mine"}


def test_conversations_leave_ray_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives lists as arrays, and would write them as pickled objects, which no other reader of Parquet knows."""
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    as_text = runpy.run_path(str(ROOT / "examples" / "ray_data_score.py"))["as_text"]
    parts = np.array([{"type": "text", "text": "é"}], dtype=object)
    prompts = np.array(["plain", None], dtype=object)
    prompts[1] = np.array([{"role": "user", "content": parts}], dtype=object)
    assert as_text(prompts).tolist() == [
        "plain", '[{"role": "user", "content": [{"type": "text", "text": "é"}]}]'
    ]  # fmt: skip
