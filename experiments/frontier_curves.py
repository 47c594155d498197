"""A run of the frontier as a curve: what its report, and what is asked of the same curves, read of it."""

import numpy as np

from poise.runtime.run_folder import Json

Curves = dict[int, dict[str, Json]]  # by seed and arm


def gain(curve: Json, name: str) -> np.ndarray:
    """Gold, or a validator's reward, of every step since the run's start, in stds of the initial completions."""
    return (np.array(curve[name]) - curve[name][0]) / curve["std_at_start"][name]


def over_three_steps(values: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(values, 1, mode="edge"), np.ones(3) / 3, "valid")
