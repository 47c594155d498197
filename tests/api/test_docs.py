"""What docs/python.md and the notebook say runs, from the first line to the last."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from poise import HeadRewards, RewardModel, TrainedPolicy

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_block_of_the_page_runs(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MODEL": tiny_model}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert isinstance(names["heads"], HeadRewards)
    assert isinstance(names["trained"], TrainedPolicy)
    assert isinstance(names["again"], RewardModel)
    assert names["again"].kinds[0] == "brme"
    assert {path.name for path in tmp_path.iterdir()} == {"my-policy", "my-reward-model"}


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), names)
    assert names["rm"].kinds == ("single", "ensemble", "posterior", "brme")
    assert names["heads"].mean.shape == (3, 64)
    assert len(names["trained"].metrics) == 3
    assert not list(tmp_path.iterdir())
