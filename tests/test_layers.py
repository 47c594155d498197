"""The architecture, enforced: imports only go down, and gold never reaches what trains or chooses."""

import ast
from pathlib import Path

import poise

ROOT = Path(poise.__file__).parent

LAYERS = [
    {
        "errors", "objectives", "losses", "metrics", "monitor", "runs", "progress", "claims",
        "processes", "trackers", "controllers", "fused", "cells", "study_summary", "selection",
    },
    {
        "registry", "models", "data", "ratings", "questions", "packing", "features", "reward_model", "heads", "scorer",
        "finetune", "judgement", "ppo", "policy", "policy_config", "policy_reward", "learner", "training", "gold",
        "bandit", "blind_spots", "pool", "curves", "arms",
    },
    {"adapters.trl", "adapters.trl_train", "adapters.benchmarks", "adapters.harness"},
    {
        "train_reward", "evaluate_reward", "ensemble", "export", "push", "train_policy", "best_of_n", "compare",
        "score", "merge", "toy", "evaluate_policy",
    },
    {
        "plots", "report", "evaluation_page", "model_card", "policy_card", "toy_figure", "recipes",
        "study", "study_config", "study_page", "study_pool", "study_verdicts", "cli",
    },
]  # fmt: skip
STUDIES = LAYERS[3]
LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
MAY_SEE_GOLD = {"gold", "best_of_n", "compare", "recipes", "study"}


def name_of(path: Path) -> str:
    """A file's module, seen from the package: `adapters.trl`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(module: str) -> set[str]:
    """Every poise module named in an import anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("poise.") for name in found if name.startswith("poise.")} & LAYER.keys()


def reachable(module: str) -> set[str]:
    seen, queue = set(), [module]
    while queue:
        for name in imports(queue.pop()) - seen:
            seen.add(name)
            queue.append(name)
    return seen


def test_every_module_has_a_layer() -> None:
    modules = {name_of(path) for path in ROOT.rglob("*.py")}
    assert modules - {"__init__", "adapters.__init__"} == LAYER.keys()


def test_imports_only_go_down() -> None:
    upward = [(a, b) for a in LAYER for b in imports(a) if LAYER[b] > LAYER[a]]
    assert upward == []


def test_studies_do_not_import_one_another() -> None:
    assert [(a, b) for a in STUDIES for b in imports(a) & STUDIES] == []


def test_no_training_code_path_reaches_gold() -> None:
    for module in LAYER.keys() - MAY_SEE_GOLD - {"cli"}:
        assert "gold" not in reachable(module), module
    assert "gold" in reachable("compare")  # the walk does see gold where it is


def test_training_does_not_load_gold_at_run_time() -> None:
    import subprocess
    import sys

    program = "import sys, poise.train_reward, poise.train_policy; print('poise.gold' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_confined_libraries() -> None:
    homes = {
        "matplotlib": {"plots"},
        "jinja2": {"report", "evaluation_page", "study_page"},
        "lm_eval": {"adapters.harness"},
        "vaderSentiment": {"gold"},
        "peft": {"policy", "fused", "finetune", "reward_model", "merge", "adapters.trl_train"},
        "trl": {"adapters.trl_train"},
    }
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                module = name_of(path)
                assert module in homes.get(name.split(".")[0], {module}), f"{module} imports {name}"


def test_pickle_and_remote_code_are_nowhere() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path.name
        assert "torch.load" not in text, path.name
        assert "trust_remote_code" not in text, path.name


def test_import_is_light() -> None:
    import subprocess
    import sys

    program = "import sys, poise, poise.cli; print(sorted({'torch', 'transformers', 'tyro'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
