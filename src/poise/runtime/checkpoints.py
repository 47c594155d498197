"""Checkpoints of `transformers.Trainer` without pickle, and the newest one that is whole."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poise.errors import PoiseError, first_line
from poise.runtime.folders import follow_umask
from poise.runtime.records import parse_json
from poise.runtime.sharding import spread_state, whole_on_main

OPTIMIZER = "optimizer.safetensors"

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # transformers is heavy, and whoever mixes this in has imported it


class SafeCheckpoints(_Trainer):
    """Mixed into a Trainer: optimizer, schedule and random states in safetensors and JSON; bit by bit."""

    optimizer: Any
    lr_scheduler: Any
    args: Any

    @property
    def sharded(self) -> bool:
        """FSDP and DeepSpeed spread weights and states over processes, and keep checkpoints in formats of their own."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()
        tensors = {
            f"{i}.{key}": whole_on_main(value) for i, entry in state["state"].items() for key, value in entry.items()
        }
        if self.args.should_save:
            schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            metadata = {"groups": json.dumps(state["param_groups"]), "schedule": json.dumps(schedule)}
            save_file({n: t.contiguous() for n, t in tensors.items()}, Path(output_dir) / OPTIMIZER, metadata)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with safe_open(Path(checkpoint) / OPTIMIZER, "pt") as file:
            entries: dict[int, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118  not a dict
                index, key = name.split(".", 1)
                entries.setdefault(int(index), {})[key] = file.get_tensor(name)
            groups, schedule = (json.loads(file.metadata()[name]) for name in ("groups", "schedule"))
        numbered = enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"])
        for i, parameter in numbered:
            for key, value in entries.get(i, {}).items():
                entries[i][key] = spread_state(value, parameter)
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.lr_scheduler.load_state_dict({**schedule, "lr_lambdas": [None] * len(groups)})

    def _save_rng_state(self, output_dir: str) -> None:
        kind, key, *numpy_rest = cast(tuple[Any, ...], np.random.get_state())
        tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(key.astype(np.int64))}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps([kind, *numpy_rest])}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(output_dir) / self._rng_file, metadata)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (path := Path(checkpoint) / self._rng_file).exists():
            return
        with safe_open(path, "pt") as file:
            version, words, gauss = json.loads(file.metadata()["python"])
            random.setstate((version, tuple(words), gauss))
            kind, *rest = json.loads(file.metadata()["numpy"])
            np.random.set_state((kind, file.get_tensor("numpy").numpy().astype(np.uint32), *rest))
            torch.set_rng_state(file.get_tensor("torch"))
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(file.get_tensor("cuda"))

    @property
    def _rng_file(self) -> str:
        return f"random-{self.args.process_index}.safetensors"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes trainer_state.json last, and may be killed before."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[-1]))
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        parse_json((checkpoint / "trainer_state.json").read_text())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):  # refuses a file that is shorter than its header says
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, replaced whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        follow_umask(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise PoiseError(f"cannot write {path}: {first_line(error)}; the last checkpoint is kept") from None
    finally:
        partial.unlink(missing_ok=True)
