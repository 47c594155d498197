"""Whether a model can be had from the model hub, answered at once where it cannot. Imports nothing heavy."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from poise.errors import PoiseError
from poise.models.choices import DEFAULT_MODEL

_SECONDS = 3.0


def check_on_hub(name: str) -> None:
    """Raise PoiseError, one line, for a hub id that is not in the hub's cache while the hub cannot be reached.

    The hub's own client tries for half a minute before it says so.
    """
    if name == DEFAULT_MODEL or (_cache() / f"models--{name.replace('/', '--')}").exists() or reachable():
        return
    raise PoiseError(
        f"model {name!r} is neither a local folder nor reachable on the model hub, which does not answer; "
        f"give the folder that it is in"
    )


def reachable() -> bool:
    """Does the hub answer? Behind a proxy, which is not asked, it is taken to."""
    if any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        with socket.create_connection((place.hostname or "", port), timeout=_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
