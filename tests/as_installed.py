"""Poise as its users have it: without the checks of types and shapes that pytest puts around every function."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def poise_as_installed() -> Iterator[Any]:
    """The package, imported anew. In the meantime `import poise` gives this one; its classes are not those of tests."""
    checked = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "poise"}
    finders = [finder for finder in sys.meta_path if type(finder).__module__.startswith("jaxtyping")]
    for name in checked:
        del sys.modules[name]
    for finder in finders:
        sys.meta_path.remove(finder)
    try:
        yield importlib.import_module("poise")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "poise"]:
            del sys.modules[name]
        sys.modules.update(checked)
        sys.meta_path[:0] = finders
