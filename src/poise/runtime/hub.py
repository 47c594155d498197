"""What the model hub has under a name, known at once: from its cache on this machine, or by one short question.

Torch is not imported for it, nor `datasets`, whose own client tries for most of a minute where nothing answers.
"""

import functools
import json
import os
import socket
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from poise.errors import PoiseError

Kind = Literal["model", "dataset"]
_SECONDS = 3.0
_CALLED = {"model": "model", "dataset": "data set"}
_ASKED_FOR = {"model": "config.json", "dataset": "README.md"}


def on_hub(name: str, kind: Kind = "model") -> Path | dict[str, Any] | None:
    """What is known of a hub id: the folder of a model in the cache, or the config.json of one on the hub, or None.

    None: the name is there, or it is left to the hub's client, since what answered is no answer to the question.
    Raises PoiseError, one line, for a name that is not in the cache while the hub does not answer, and for one that
    the hub does not have or does not give to this user.
    """
    if kind == "model" and (folder := snapshot(name)):
        return folder
    if kind == "dataset" and any(place.exists() for place in _places_of_data(name)):
        return None
    if not reachable():
        part = _part(name, kind).exists()
        raise PoiseError(
            f"{_CALLED[kind]} {name!r} is neither a local {'folder' if kind == 'model' else 'file'} nor reachable on "
            f"the model hub, which does not answer; "
            + ("the copy in its cache is not whole" if part else f"give the {_GIVE[kind]}")
        )
    return _ask(name, kind, _endpoint())


_GIVE = {"model": "folder that it is in", "dataset": "file that it is in"}


def snapshot(name: str) -> Path | None:
    """The folder of a model in the hub's cache, if every file of weights is there: a download may have been cut off."""
    place = _part(name, "model")
    try:
        folder = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
        return folder if (folder / "config.json").exists() and has_weights(folder) else None
    except (OSError, ValueError):
        return None


def has_weights(folder: Path) -> bool:
    """Is there a safetensors file, and each one that an index names?"""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # damaged: the reader of the folder says how
    return all((folder / str(file)).exists() for file in named)


def reachable() -> bool:
    """Does the hub answer? Behind a proxy, which is not asked, it is taken to."""
    if any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    place = urlsplit(_endpoint())
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        with socket.create_connection((place.hostname or "", port), timeout=_SECONDS):
            return True
    except (OSError, ValueError):
        return False


@functools.cache
def _ask(name: str, kind: Kind, endpoint: str) -> dict[str, Any] | None:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

    group = "datasets/" if kind == "dataset" else ""
    address = f"{endpoint}/{group}{quote(name)}/resolve/main/{_ASKED_FOR[kind]}"
    try:
        validate_repo_id(name)
        answer = get_session().request(
            "GET" if kind == "model" else "HEAD", address, headers=build_hf_headers(), timeout=_SECONDS,
            follow_redirects=True,
        )  # fmt: skip
        hf_raise_for_status(answer)
        found = answer.json() if kind == "model" else None
    except GatedRepoError:
        raise PoiseError(
            f"{_CALLED[kind]} {name!r} is gated on the model hub: accept its terms on its page there, and log in with "
            f"`hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise PoiseError(
            f"no {_CALLED[kind]} {name!r} on the model hub, or none that you may read, and no local one"
        ) from None
    except EntryNotFoundError:
        if kind == "dataset":
            return None
        raise PoiseError(f"{name!r} on the model hub is not a model folder: it has no config.json") from None
    except Exception:  # noqa: BLE001  no plain answer: the client, which tries longer, will say what there is to say
        return None
    return found if isinstance(found, dict) else None


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _home() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser()


def _part(name: str, kind: Kind) -> Path:
    """Where the hub's cache keeps what it has of a name."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser()
    return cache / f"{kind}s--{name.replace('/', '--')}"


def _places_of_data(name: str) -> tuple[Path, Path]:
    """Where the hub's cache and that of `datasets` keep a data set."""
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()
    return _part(name, "dataset"), prepared / name.replace("/", "___")
