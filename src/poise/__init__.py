"""Poise: reward-robust RLHF.

Names are imported on first use: `import poise` alone costs milliseconds.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "HeadRewards": "poise.functional.objectives",
    "parse_objective": "poise.functional.objectives",
    "Scorer": "poise.models.scorer",
    "Sample": "poise.data.preferences",
    "Preference": "poise.data.preferences",
    "Policy": "poise.models.policy",
    "Run": "poise.runtime.run_folder",
    "PoiseError": "poise.errors",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'poise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
