"""How many processes share a run, and which of them this is. Does not import torch: without it there is one."""

import sys


def several() -> bool:
    """Has this process met the others of its run? See `poise.runtime.distributed.join`."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def num_processes() -> int:
    return sys.modules["torch"].distributed.get_world_size() if several() else 1


def process_index() -> int:
    return sys.modules["torch"].distributed.get_rank() if several() else 0
