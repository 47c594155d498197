"""The architecture, enforced: imports only go down, and gold never reaches what trains or chooses."""

import ast
import functools
from pathlib import Path

import pytest

import poise

ROOT = Path(poise.__file__).parent

# Rooms from the ground up. A room imports from rooms below it; rooms of one floor do not know each other.
FLOORS = (
    {"errors"},
    {"runtime"},
    {"functional", "data"},
    {"models", "toy"},
    {"serve"},
    {"integrations"},
    {"reward", "policy"},
    {"reports"},
    {"api"},
    {"studies"},
    {"cli"},
)
MAY_SEE_GOLD = {"studies.gold", "studies.best_of_n", "studies.compare", "studies.quickstart", "studies.study"}
FLOOR = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def name_of(path: Path) -> str:
    """A file's module, seen from the package: `adapters.trl`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def modules() -> frozenset[str]:
    """Every module but the package's own faces, `poise/__init__.py` and `python -m poise`."""
    return frozenset(name_of(path) for path in ROOT.rglob("*.py")) - {"__init__", "__main__"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every poise module named in an import anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree(ROOT / f"{module.replace('.', '/')}.py")):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name.removeprefix("poise.") for name in found if name.startswith("poise.")) & modules()


def reachable(module: str) -> set[str]:
    seen, queue = set(), [module]
    while queue:
        for name in imports(queue.pop()) - seen:
            seen.add(name)
            queue.append(name)
    return seen


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_floor() -> None:
    assert {room_of(module) for module in modules()} == FLOOR.keys()


def test_imports_only_go_down() -> None:
    rooms = [(a, room_of(a), b, room_of(b)) for a in modules() for b in imports(a)]
    assert [(a, b) for a, above, b, below in rooms if above != below and FLOOR[above] <= FLOOR[below]] == []


def test_no_module_imports_itself_through_others() -> None:
    assert [module for module in modules() if module in reachable(module)] == []


def test_no_training_code_path_reaches_gold() -> None:
    for module in modules() - MAY_SEE_GOLD:
        assert "studies.gold" not in reachable(module), module
    assert "studies.gold" in reachable("studies.compare")  # the walk does see gold where it is


@pytest.mark.slow
def test_training_does_not_load_gold_at_run_time() -> None:
    import subprocess
    import sys

    program = "import sys, poise.reward.train, poise.policy.train; print('poise.studies.gold' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_each_library_is_imported_only_by_its_home() -> None:
    homes = {
        "matplotlib": {"reports.plot_style", "reports.plots", "reports.run_plots", "reports.study_plots"},
        "jinja2": {"models.template_trial", "reports.quickstart_page", "reports.reward_page", "reports.study_page"},
        "lm_eval": {"integrations.lm_eval"},
        "vaderSentiment": {"studies.gold"},
        "peft": {
            "models.adapted_maps",
            "models.trained_parts",
            "models.fused_ops",
            "models.loading",
            "reward.trunk_training",
        },
        "trl": {"integrations.trl_trainers"},
        "starlette": {"serve.app"},
        "uvicorn": {"serve.server"},
        "prometheus_client": {"serve.metrics"},
        "pydantic": {"serve.forms"},
        "swift": {"integrations.ms_swift_reward"},
        "skyrl_gym": {"integrations.skyrl_env"},
        "verl": {"integrations.verl_manager"},
        "molt": {"integrations.molt_env"},
        "ray": {"integrations.ray_serve"},
    }
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                module = name_of(path)
                assert module in homes.get(name.split(".")[0], {module}), f"{module} imports {name}"


def test_modules_and_classes_are_short_enough_to_be_read_at_once() -> None:
    """Up to 400 lines for a module and 300 for a class."""
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 300, f"{path.name}: {node.name}"


def test_pickle_and_remote_code_are_nowhere() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path.name
        assert "torch.load" not in text, path.name
        assert text.count("trust_remote_code") == text.count("trust_remote_code=False"), path.name


def test_import_is_light() -> None:
    import subprocess
    import sys

    program = "import sys, poise, poise.cli.main; print(sorted({'torch', 'transformers', 'tyro'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
