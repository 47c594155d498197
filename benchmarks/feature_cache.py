"""What keeping trunk features on disk costs, against the feature precomputation of rewarduq 0.1.0.

    python benchmarks/feature_cache.py --peer PEER/bin/python [--repeats 3]

Both keep the same 5,000 pairs (10,000 texts of 33 tokens) of 1,024 float32 features, and neither runs a trunk: the
features come from one table, asked in padded batches of 64.

    precompute   texts as token ids in; features stored and ready for training.
                 Peer: `RewardUQTrainer._setup_precomputed_features`. Ours: `row_keys`, `FeatureCache.fetch`, `flush`.
    store        the same without asking for features.
                 Peer: that less `_precompute_features`. Ours: `row_keys`, `insert`, `flush`, which syncs the disk.
    reuse        a new process's way to all features that are on disk already.
                 Peer: `_setup_precomputed_features` again. Ours: open the cache, `row_keys`, `lookup`.
    batch of 16  Peer: the trainer's collator on 8 rows of its dataset. Ours: `lookup`, checksums included.
    disk         Peer: the folder of its precomputed features. Ours: the cache's.

Prints JSON; dated results lie in results/. The peer lives in an environment of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poise.models.feature_cache import FeatureCache, row_keys, trunk_fingerprint
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.runtime.run_folder import environment

PAIRS, HIDDEN, TOKENS, BATCH = 5000, 1024, 33, 64
FIRST_ROW_ID = 200  # a text's largest token id, less this, is its row in the table
MANY = 1_000_000
HOW_TO = """the peer is not measured; to make its environment:
    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 rewarduq==0.1.0 transformers==4.57.3 \\
        datasets==4.4.2 peft==0.18.0 accelerate==1.12.0
    python benchmarks/feature_cache.py --peer PEER/bin/python"""


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_texts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    filler = generator.integers(0, FIRST_ROW_ID, (2 * PAIRS, TOKENS - 1))
    return [[*row.tolist(), FIRST_ROW_ID + i] for i, row in enumerate(filler)]


def ours(table: np.ndarray, texts: list[list[int]]) -> dict[str, Any]:
    features = torch.from_numpy(table)

    def compute(part: list[list[int]]) -> torch.Tensor:
        batches = [torch.tensor(part[start : start + BATCH]) for start in range(0, len(part), BATCH)]
        return torch.cat([features[ids.amax(1) - FIRST_ROW_ID] for ids in batches])

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def precompute() -> None:
            with FeatureCache(root, "precompute", HIDDEN) as cache:
                got.append(cache.fetch(texts, row_keys(texts), compute))

        def store() -> None:
            with FeatureCache(root, "store", HIDDEN) as cache:
                cache.insert(row_keys(texts), table)

        def reuse() -> None:
            rows, found = FeatureCache(root, "precompute", HIDDEN).lookup(row_keys(texts))
            got.append(torch.from_numpy(rows))
            assert found.all()

        got: list[torch.Tensor] = []
        report = {"precompute_s": seconds(precompute), "disk_bytes": disk_bytes(root), "store_s": seconds(store)}
        report |= {"reuse_s": seconds(reuse)}
        assert all(torch.equal(each, features) for each in got)
        report["open_s"] = seconds(lambda: FeatureCache(root, "precompute", HIDDEN))
        cache, keys = FeatureCache(root, "precompute", HIDDEN), row_keys(texts)
        generator = np.random.default_rng(1)
        picks = [keys[generator.integers(0, len(keys), 16)] for _ in range(300)]
        report["batch_of_16_s"] = statistics.median([seconds(lambda p=p: cache.lookup(p)) for p in picks][100:])
    return report


def index_seconds() -> float:
    """Opening a cache of a million rows, in 50 segments; narrow rows, which the index does not read."""
    generator = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(50):
            with FeatureCache(Path(folder), "many", 4) as cache:
                keys = generator.integers(0, 256, (MANY // 50, 16), np.uint8)
                cache.insert(keys, np.zeros((len(keys), 4), np.float32))
        return statistics.median(seconds(lambda: FeatureCache(Path(folder), "many", 4)) for _ in range(5))


def peer(python: str, table: np.ndarray) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "features.npy"), table)
        script = Path(__file__).with_name("rewarduq_precompute.py")
        done = subprocess.run(
            [python, str(script), folder, str(PAIRS), str(HIDDEN)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of every time with its range over the runs; what is not a time as the first run has it."""

    def of(name: str) -> list[float]:
        times = sorted(report[name] for report in reports)
        return [float(f"{value:.3g}") for value in (statistics.median(times), times[0], times[-1])]

    return {name: of(name) if isinstance(value, float) else value for name, value in reports[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="", help="the Python of the peer's environment")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = np.random.default_rng(0).standard_normal((2 * PAIRS, HIDDEN), np.float32)
    texts = make_texts()
    ours(table, texts)  # warm up
    has_peer = Path(options.peer).is_file()
    mine, theirs = [], []
    for _ in range(options.repeats):  # in turns, so that both meet the same machine
        mine += [ours(table, texts) for _ in range(3)]
        theirs += [peer(options.peer, table)] if has_peer else []
    report: dict[str, Any] = {"ours": summary(mine), "feature_bytes": table.nbytes}
    if has_peer:
        report["peer"] = summary(theirs)
        report["peer_over_ours"] = {
            name: round(report["peer"][name][0] / report["ours"][name][0], 1)
            for name in ("precompute_s", "store_s", "reuse_s", "batch_of_16_s")
        } | {"disk_bytes": round(report["peer"]["disk_bytes"] / report["ours"]["disk_bytes"], 3)}
    else:
        print(HOW_TO, file=sys.stderr)
    trunk = load_trunk(DEFAULT_MODEL, 0)[0]
    report |= {
        "index_of_a_million_rows_s": round(index_seconds(), 3),
        "trunk_fingerprint_s": round(statistics.median(seconds(lambda: trunk_fingerprint(trunk)) for _ in range(5)), 3),
        "trunk_bytes": sum(p.numel() * p.element_size() for p in trunk.base_model.parameters()),
        "setting": f"{PAIRS} pairs x 2 texts x {HIDDEN} float32; [median, lowest, highest] of {3 * options.repeats} "
        f"runs, {options.repeats} of the peer, each in a fresh folder",
        "environment": {
            **environment(),
            "cores": os.cpu_count(),
            "command": ["feature_cache.py", "--peer", "PEER/bin/python", "--repeats", str(options.repeats)],
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
