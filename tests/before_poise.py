"""What happens in a test process before Poise is imported, for the sake of time.

The libraries that Poise uses are imported here. Under jaxtyping's hook Python compiles anew every library that a module
of Poise is the first to import: 15 of 39 seconds of processor in each test process.

Functions without shapes are checked by beartype alone. jaxtyping's wrapper binds the arguments of every call and checks
them twice: half of the time of building a page. tests/test_types.py shows that both kinds of check are there.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import beartype
import datasets  # noqa: F401
import jaxtyping
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import transformers.trainer  # noqa: F401

_jaxtyped = jaxtyping.jaxtyped
_beartyped = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def _checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    if function is None:
        return functools.partial(_checked, typechecker=typechecker)
    if inspect.isfunction(function) and not any(map(_has_shapes, function.__annotations__.values())):
        return _beartyped(function)
    return _jaxtyped(function, typechecker=typechecker)


def _has_shapes(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return True  # not evaluated yet: it may have
    is_array = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_array or any(map(_has_shapes, typing.get_args(annotation)))


jaxtyping.jaxtyped = _checked  # the decorator that `--jaxtyping-packages` gives every function of Poise
