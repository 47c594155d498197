"""What a function that a program gives computes, in a few characters: its code, and the values that it refers to."""

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_EMPTY = CellType()  # a closure's cell that nothing was put into yet
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def digest_of(function: Any) -> str:
    """Eight characters that another function has not, such as a cell's lambda that was edited and run again.

    Code counts, with that of functions of the same package that it calls; so do defaults, closures and globals, if they
    are numbers, texts, arrays, modules of torch, or containers of these; and of an object that is called, what it
    holds. Of anything else only the type counts.

    >>> digest_of(lambda x: x + 1) == digest_of(lambda x: x + 1)
    True
    >>> digest_of(lambda x: x + 1) == digest_of(lambda x: x + 2)
    False
    """
    state = hashlib.blake2b(digest_size=4)
    for part in _Reader(function).parts():
        state.update(part + b"\0")
    return state.hexdigest()


class _Reader:
    """Takes a function apart, each part of it once."""

    def __init__(self, function: Any):
        self.function, self.package, self.seen = function, _package(function), dict[int, Any]()

    def parts(self) -> Iterator[bytes]:
        function = self.function
        if isinstance(function, (FunctionType, MethodType, functools.partial)):
            yield from self._parts(function)
            return
        yield str(getattr(function, "__qualname__", "")).encode()
        yield from self._parts([getattr(type(function), name, None) for name in ("__call__", "forward")])
        yield from self._parts(vars(function) if hasattr(function, "__dict__") else None)

    def _parts(self, value: Any) -> Iterator[bytes]:
        yield type(value).__qualname__.encode()
        if isinstance(value, _PLAIN):
            yield repr(value).encode()
        elif id(value) not in self.seen:
            self.seen[id(value)] = value  # kept, so that no other gets its id
            for held in self._held_by(value):
                yield from [held] if isinstance(held, bytes) else self._parts(held)

    def _held_by(self, value: Any) -> Iterator[Any]:
        """What of a value decides what it computes: bytes, or values that are taken apart in turn."""
        if isinstance(value, FunctionType) and _package(value) == self.package:
            found = value.__globals__
            yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            yield [found[name] for name in _names(value.__code__) if name in found]
            yield from (cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY)
        elif isinstance(value, CodeType):
            yield from (value.co_code, list(value.co_names), list(value.co_consts))
        elif isinstance(value, MethodType):
            yield from (value.__func__, vars(value.__self__) if hasattr(value.__self__, "__dict__") else None)
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, Mapping):
            yield from (part for pair in value.items() for part in pair)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(repr(one) for one in value)
        elif isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, (type, FunctionType, ModuleType)):
            yield f"{_package(value)}.{value.__name__}"
        elif hasattr(value, "detach"):  # a tensor, whose type NumPy may not have
            whole = value.detach().cpu().contiguous().flatten()
            yield from (list(value.shape), whole.view(sys.modules["torch"].uint8).numpy().tobytes())
        elif hasattr(value, "tobytes"):
            yield from (list(getattr(value, "shape", ())), value.tobytes())
        elif hasattr(value, "state_dict"):
            yield dict(value.state_dict())


def _package(value: Any) -> str:
    named = getattr(value, "__module__", None) or type(value).__module__
    return str(named).split(".")[0]


def _names(code: CodeType) -> list[str]:
    """Global names in a function, and in the functions within it."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return list(dict.fromkeys([*code.co_names, *inner]))
