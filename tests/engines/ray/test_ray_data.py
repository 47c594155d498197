"""Ray Data on a local cluster: examples/ray_data_score.py gives every row the numbers of `poise score`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from poise.reward import score

ROOT = Path(__file__).parents[3]
ROWS = 1200


@pytest.mark.timeout(1200)  # on a busy machine Ray takes minutes to start
def test_the_example_gives_the_scores_of_the_command(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], tmp_path: Path
) -> None:
    turns = json.dumps([{"role": "user", "content": "Review a phone."}])
    rows = [{"prompt": turns if i % 3 else "Review.", "completion": f"a good film {i}"} for i in range(ROWS)]
    source = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=300)
    reward = str(train_tiny_reward(tiny_model))
    expected = pyarrow.parquet.read_table(
        score.run(score.Config(reward, str(source), output=str(tmp_path / "scores.parquet")))
    ).to_pylist()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "ray_data_score.py", reward, source, tmp_path / "by_ray"],
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["completion"]: row for row in pyarrow.parquet.read_table(tmp_path / "by_ray").to_pylist()}
    assert len(found) == len(expected) == ROWS
    differences: list[float] = []
    for row in expected:
        other = found[row["completion"]]
        for name in ("mean", "std"):
            other |= {f"{name}_{k}": value for k, value in enumerate(other.pop(name))}
        assert other.keys() == row.keys()
        numbers = [name for name, value in row.items() if isinstance(value, float)]
        differences.append(max(abs(row[name] - other[name]) / max(1.0, abs(row[name])) for name in numbers))
        assert row["nominal_head"] == other["nominal_head"]
    assert max(differences) < 1e-5
    if path := os.environ.get("ENGINE_RESULT"):
        result = {
            "engine": "ray", "version": metadata.version("ray"), "date": time.strftime("%Y-%m-%d"), "rows": ROWS,
            "workers": 1, "columns": sorted(expected[0]), "largest_difference": float(np.max(differences)),
            "seconds_with_start_of_ray": round(seconds, 1),
        }  # fmt: skip
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
