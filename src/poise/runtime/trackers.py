"""Other places to log a run to (TensorBoard, W&B, trackio, …), through accelerate; none by default."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from poise.errors import PoiseError
from poise.runtime.run_folder import Json, is_main_process

Track = Callable[[Json, int], None]
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}  # of trackers whose packages have other names


def check_trackers(names: Sequence[str]) -> None:
    """Raise PoiseError for a tracker that is unknown or whose package is missing; accelerate would drop it silently.

    Before accelerate is imported, and torch with it, its source says the names, and packages are looked for by theirs.
    """
    if not names:
        return
    if "accelerate" not in sys.modules and (known := _named_in_source()):
        for name in names:
            if name not in known:
                raise PoiseError(f"--trackers: no tracker {name!r}; accelerate knows {', '.join(known)}")
            if not any(importlib.util.find_spec(package) for package in _PACKAGES.get(name, (name,))):
                raise PoiseError(f"--trackers {name}: its package is not installed")
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    ready = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in {str(known) for known in LOGGER_TYPE_TO_CLASS}:
            raise PoiseError(f"--trackers: no tracker {name!r}; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in ready:
            raise PoiseError(f"--trackers {name}: its package is not installed")


def _named_in_source() -> list[str]:
    package = importlib.util.find_spec("accelerate")
    source = Path(package.origin).parent / "tracking.py" if package and package.origin else Path()
    return re.findall(r'^    name = "(\w+)"', source.read_text(encoding="utf-8"), re.M) if source.is_file() else []


@contextlib.contextmanager
def tracked(names: Sequence[str], folder: Path, settings: Json) -> Iterator[Track]:
    """Yield `track(metrics, step)`; numbers and lists of numbers are sent on, one series for each."""
    if not names or not is_main_process():
        yield lambda _metrics, _step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    accelerator.init_trackers("poise", config={name: _plain(value) for name, value in settings.items()})
    try:
        yield lambda metrics, step: accelerator.log(flat(metrics), step=step)
    finally:
        accelerator.end_training()


def flat(metrics: Json) -> dict[str, float]:
    """Numbers only, nested ones by path.

    >>> flat({"kl": 1.0, "heads": [0.5, 2], "signs": {"kl": 3}, "action": "log", "alarm": True})
    {'kl': 1.0, 'heads/0': 0.5, 'heads/1': 2.0, 'signs/kl': 3.0, 'alarm': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            found[name] = float(value)
        elif isinstance(value, (list, dict)):
            parts = value if isinstance(value, dict) else {str(i): part for i, part in enumerate(value)}
            found |= {f"{name}/{key}": part for key, part in flat(parts).items()}
    return found


def _plain(value: object) -> int | float | str | bool:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
