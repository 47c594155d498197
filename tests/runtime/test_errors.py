"""Errors leave the process that raised them: workers of Ray, of data sets and of data loaders hand them on pickled."""

import importlib
import pickle
import re
from pathlib import Path

import pytest

import poise
from poise.errors import PoiseError

SOURCE = Path(poise.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if re.search(r"^class \w+\(PoiseError\):", path.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("module", MODULES)
def test_an_error_in_another_process_says_the_same(module: str) -> None:
    """The server's refusals could not be read again: verl's trainer got Ray's traceback instead of the line."""
    found = [
        kind
        for kind in vars(importlib.import_module(module)).values()
        if isinstance(kind, type) and issubclass(kind, PoiseError) and kind.__module__ == module
    ]
    assert found
    for kind in found:
        error = kind("a line")
        error.note = 422
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.note) == (kind, "a line", 422)
