"""Columns of `datasets` that hold a class: each row has the number of its name, which says nothing without the names.

The names stand in the schema of the table, also in Parquet and Arrow files that `datasets` wrote.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

_LISTS = ("List", "LargeList", "Sequence")
_NO_CLASS = -1


def with_class_names(
    rows: Iterable[dict[str, Any]], metadata: Mapping[bytes, bytes] | None
) -> Iterable[dict[str, Any]]:
    """Rows with the name of each class in place of its number; None where `datasets` writes that there is none.

    metadata: of the table's schema.
    """
    of_classes = {name: kind for name, kind in _features(metadata).items() if '"ClassLabel"' in json.dumps(kind)}
    if not of_classes:
        return rows
    return (row | {name: _named(row[name], kind) for name, kind in of_classes.items() if name in row} for row in rows)


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` wrote of each column; nothing for tables of others."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(value: Any, kind: Any) -> Any:
    """A value of a column whose kind is ClassLabel, or holds some in lists and structs."""
    if isinstance(kind, list) and kind:  # how earlier versions write lists
        kind = {"_type": "List", "feature": kind[0]}
    if not isinstance(kind, dict):
        return value
    if kind.get("_type") == "ClassLabel":
        names = kind.get("names") or []
        if value == _NO_CLASS:
            return None
        return names[value] if type(value) is int and 0 <= value < len(names) else value
    if kind.get("_type") in _LISTS and isinstance(value, list):
        return [_named(one, kind.get("feature")) for one in value]
    if "_type" not in kind and isinstance(value, dict):
        return {name: _named(one, kind.get(name)) for name, one in value.items()}
    return value
