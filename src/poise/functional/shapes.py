"""Shapes that must be alike: arrays that do not fit are refused, not broadcast into another number."""

from typing import Any

from poise.errors import PoiseError


def same_shape(function: str, **arrays: Any) -> None:
    """Raise PoiseError, naming the two, unless all arrays or tensors have the shape of the first.

    >>> import numpy as np
    >>> same_shape("loss", chosen=np.zeros(3), rejected=np.ones(3))
    """
    first, *others = arrays
    for name in others:
        fits(function, name, arrays[name], tuple(arrays[first].shape), f", as {first}")


def fits(function: str, name: str, array: Any, shape: tuple[int, ...], why: str = "") -> None:
    """Raise PoiseError unless an array or tensor has this shape."""
    if tuple(array.shape) != shape:
        raise PoiseError(f"{function}: {name} must be of shape {shape}{why}, not {tuple(array.shape)}")
