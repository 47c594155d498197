"""What the functions here take, checked by their own annotations: what does not fit is refused, not broadcast.

`@checked` reads a function's annotations once. At a call, arrays must be of the library, the kind and the shape that
they say; axes of one name have one length, and an axis with a name is never empty (`*batch` may be). Numbers are
numbers, in the range beside them. Whole numbers and booleans become floats where floats are meant. The values of
tensors are not looked at: on a GPU that would wait for them. Those of NumPy arrays are, where a range is beside them.
"""

import collections.abc
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from poise.errors import PoiseError
from poise.runtime.settings import Range, shown

P = ParamSpec("P")
R = TypeVar("R")
# Ranges of NumPy arrays: a NaN among values that are ranked would take any place, and silently.
KNOWN = Range()
FINITE = Range(-sys.float_info.max, sys.float_info.max)
Finite = Annotated[float, FINITE]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which raises PoiseError, on one line, for arguments that its annotations do not allow.

    >>> @checked
    ... def double(number: Annotated[float, Range(0, 1)]) -> float:
    ...     return 2 * number
    >>> double(0.5)
    1.0
    """
    kinds = function.__annotations__
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        axes = _Axes(function.__name__)
        placed = [axes.fit(name, one, kinds.get(name)) for name, one in zip(names, args, strict=False)]
        named = {name: axes.fit(name, one, kinds.get(name)) for name, one in kwargs.items()}
        return function(*placed, *args[len(placed) :], **named)  # type: ignore[arg-type]

    return call


class _Axes:
    """The axes of one call: how long each is, and which argument said so first."""

    def __init__(self, function: str):
        self.function = function
        self.device: tuple[str, Any] = ("", None)
        self.sizes: dict[str, tuple[tuple[int, ...], str]] = {}

    def fit(self, name: str, value: Any, kind: Any) -> Any:
        """The value, as floats where those are meant. Raises PoiseError where `kind` does not allow it."""
        origin, parts = get_origin(kind), get_args(kind)
        if origin is None and hasattr(kind, "dim_str"):
            return self._array(name, value, kind)
        if inspect.isclass(kind) and hasattr(kind, "_fields"):
            return self._tuple(name, value, kind)
        if origin in (Union, UnionType):
            return value if value is None and NoneType in parts else self.fit(name, value, _like(value, parts))
        if origin is Annotated:
            value = self.fit(name, value, parts[0])
            for allowed in parts[1:]:
                self._inside(name, value, allowed)
        elif kind is float and (not isinstance(value, Real) or isinstance(value, bool)):
            raise self._error(name, "a number", f"got {shown(value)}")
        elif kind is int and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise self._error(name, "a whole number", f"got {shown(value)}")
        elif kind is str and not isinstance(value, str):
            raise self._error(name, "text", f"got {shown(value)}")
        elif origin is collections.abc.Callable and not callable(value):
            raise self._error(name, "a function", f"not {type(value).__name__}")
        elif origin in (collections.abc.Sequence, collections.abc.Mapping):
            self._items(name, value, origin, parts[-1])
        return value

    def _inside(self, name: str, value: Any, allowed: Range) -> None:
        ends = (value.min().item(), value.max().item()) if hasattr(value, "dtype") else (value,)  # NaN is both
        for end in ends:
            if end not in allowed:
                wanted = "finite" if allowed is FINITE else "no NaN" if allowed is KNOWN else allowed.violated_by(end)
                raise self._error(name, wanted, f"got {shown(float(end))}")

    def _items(self, name: str, value: Any, origin: Any, kind: Any) -> None:
        named = issubclass(origin, Mapping)
        listed = isinstance(value, Iterable) and hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0
        if isinstance(value, (str, bytes)) or named != isinstance(value, Mapping) or not listed:
            raise self._error(name, "a mapping" if named else "a list", f"not {type(value).__name__}")
        for place, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            self.fit(f"{name}[{place!r}]", one, kind)

    def _tuple(self, name: str, value: Any, kind: Any) -> Any:
        """A named tuple of arrays: their axes are its own."""
        if not hasattr(value, "_fields") or value._fields != kind._fields:
            raise self._error(name, kind.__name__, f"not {type(value).__name__}")
        own, kinds = _Axes(self.function), _fields_of(kind)
        own.device = self.device
        fitted = {field: own.fit(field, one, kinds[field]) for field, one in zip(value._fields, value, strict=True)}
        self.device = own.device
        fits = all(fitted[field] is one for field, one in zip(value._fields, value, strict=True))
        return value if fits else value._replace(**fitted)

    def _array(self, name: str, value: Any, kind: Any) -> Any:
        is_tensor, numbers, axes, rest = _parts_of(kind)
        if not isinstance(value, kind.array_type) or type(value).__name__ == "MaskedArray":
            library = "a torch tensor" if is_tensor else "a NumPy array"
            raise self._error(name, library, f"not {type(value).__name__}")
        if not (is_tensor and numbers == "Float" and value.is_floating_point()):
            value = self._numbers(name, value if is_tensor else value.view(kind.array_type), numbers)
        self._shape(name, tuple(value.shape), axes, rest)
        if is_tensor and value.dim():
            first, device = self.device
            if first and device != value.device:
                raise self._error(name, f"on {device}, as {first}", f"not on {value.device}")
            self.device = name, value.device
        return value

    def _numbers(self, name: str, value: Any, kind: str) -> Any:
        """The array with numbers of the kind: floats may be given as whole numbers or booleans, others as they are."""
        given = str(value.dtype).removeprefix("torch.")
        wanted = {"Float": ("float",), "Bool": ("bool",)}.get(kind, ("int", "uint"))
        is_tensor = hasattr(value, "requires_grad")
        if given.startswith(wanted) and (is_tensor or given != "float16"):  # NumPy solves nothing in halves
            return value
        if kind == "Float" and given.startswith(("int", "uint", "bool", "float16")):
            return value.float() if is_tensor else value.astype(float)
        words = {"Float": "real numbers", "Bool": "booleans"}.get(kind, "whole numbers")
        raise PoiseError(f"{self.function}: {name} must hold {words}, not {given}")

    def _shape(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], rest: int | None) -> None:
        """Every axis as long as that of its name in other arguments; that at `rest` is any number of axes."""
        if (len(shape) != len(axes)) if rest is None else (len(shape) < len(axes) - 1):
            raise self._error(name, f"of shape ({', '.join(axes)})", f"not {shape}")
        many = len(shape) - len(axes) + 1  # axes that the one at `rest` stands for
        expected, why = list[int](), ""
        for place, axis in enumerate(axes):
            start = place if rest is None or place <= rest else place + many - 1
            there = shape[start : start + many] if place == rest else shape[start : start + 1]
            if place != rest and there == (0,):
                raise PoiseError(f"{self.function}: {name} is empty, of shape {shape}; give at least one of {axis}")
            sizes, first = self.sizes.setdefault(axis, (there, name)) if axis != "..." else (there, name)
            if axis.isdigit():
                sizes, first = (int(axis),), ""
            why = first if sizes != there and not why else why
            expected.extend(sizes)
        if tuple(expected) != shape:
            raise self._error(name, f"of shape {tuple(expected)}{f', as {why}' if why else ''}", f"not {shape}")

    def _error(self, name: str, wanted: str, got: str) -> PoiseError:
        return PoiseError(f"{self.function}: {name} must be {wanted}, {got}")


@functools.cache
def _parts_of(kind: Any) -> tuple[bool, str, tuple[str, ...], int | None]:
    """(of torch?, kind of numbers, names of axes, which of them is any number of axes) of an array's annotation."""
    axes = tuple(kind.dim_str.split())
    rest = next((place for place, axis in enumerate(axes) if axis.startswith(("*", "..."))), None)
    return hasattr(kind.array_type, "requires_grad"), kind.dtype.__name__, axes, rest


@functools.cache
def _fields_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _like(value: Any, kinds: Sequence[Any]) -> Any:
    """Of several kinds the one that a value is meant as: an array's, or the last."""
    arrays = [kind for kind in kinds if hasattr(kind, "dim_str")]
    others = [kind for kind in kinds if kind is not NoneType and kind not in arrays]
    return arrays[0] if arrays and (hasattr(value, "dtype") or not others) else others[-1]
