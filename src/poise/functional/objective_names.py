"""What a config may name as an objective, and the range of each parameter; read before torch is imported.

The formulas are in `poise.functional.objectives`, which checks its parameters here.
"""

import math
import re
from numbers import Real
from typing import Literal, NamedTuple

from poise.errors import PoiseError
from poise.runtime.settings import HUGE, Range, at_least, between

Shaping = Literal["none", "contrastive", "par"]


class Parameter(NamedTuple):
    """The one parameter of an objective."""

    words: str
    allowed: Range
    hint: str = ""


_WEIGHT = Parameter("nominal weight", between(0, 1))
_COEFFICIENT = Parameter("coefficient", at_least(0, HUGE))
# By name; None for an objective without a parameter. Below 1e-9 a soft minimum divides by next to nothing.
PARAMETERS: dict[str, Parameter | None] = {
    "nominal": None,
    "worst_case": None,
    "tradeoff": _WEIGHT,
    "mean": None,
    "median": None,
    "random_head": None,
    "quantile": Parameter("level", between(0, 1)),
    "uncertainty_weighted": _COEFFICIENT,
    "lower_confidence": _COEFFICIENT,
    "typical": _COEFFICIENT,
    "reliable": _COEFFICIENT,
    "soft_min": Parameter("temperature", between(1e-9, 1e9), "; worst_case is its limit at 0"),
    "expected_worst_case": None,
    "expected_tradeoff": _WEIGHT,
    "constant": Parameter("value", between(-HUGE, HUGE)),
}

_SPEC = re.compile(r"^\s*(\w+)\s*(?:\(\s*([^()\s]*)\s*\))?\s*$", re.ASCII)


def read_objective(spec: str) -> tuple[str, float | None]:
    """(name, parameter) of an objective as a config names it; None for the parameter's default.

    Raises PoiseError for an unknown name, a parameter that is no finite number or out of range, or one too many.

    >>> read_objective("lower_confidence(2)"), read_objective("worst_case")
    (('lower_confidence', 2.0), ('worst_case', None))
    """
    match = _SPEC.match(spec) if isinstance(spec, str) else None
    if match is None or match[1] not in PARAMETERS:
        raise PoiseError(f"unknown objective {spec!r}; choose from {', '.join(PARAMETERS)}, e.g. tradeoff(0.4)")
    name, argument = match[1], match[2]
    if not argument:
        return name, None
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or PARAMETERS[name] is None:
        raise PoiseError(f"objective {spec!r}: {name} takes no parameter {argument!r}")
    check_parameter(name, value)
    return name, value


def in_one_spelling(choice: str) -> str:
    """REWARD:OBJECTIVE with its number in one form, so that `brme:tradeoff(.40)` is known as `brme:tradeoff(0.4)`.

    What is no objective stays as it is.
    """
    reward, colon, spec = choice.partition(":")
    try:
        name, value = read_objective(spec)
    except PoiseError:
        return choice
    return f"{reward.strip()}{colon}{name}{'' if value is None else f'({value!r})'}"


def check_parameter(name: str, value: int | float) -> None:
    """Raise PoiseError for a value that the parameter of objective `name` cannot have, NaN and infinity included."""
    parameter = PARAMETERS[name]
    if parameter is not None and not isinstance(value, Real):
        raise PoiseError(f"{name}'s {parameter.words} must be a number, got {value!r}")
    if parameter is not None and value not in parameter.allowed:
        wrong = f"{parameter.allowed.violated_by(value)}, got {value:g}"
        raise PoiseError(f"{name}'s {parameter.words} must be {wrong}{parameter.hint}")
