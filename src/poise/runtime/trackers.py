"""Other places to log a run to (TensorBoard, W&B, trackio, …), through accelerate; none by default."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from poise.errors import PoiseError, first_line
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, is_main_process

Track = Callable[[Json, int], None]
_REST = 63
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
    """Yield `track(metrics, step)`; numbers and lists of numbers are sent on, one series for each.

    A tracker that fails at the start is a PoiseError. One that fails later costs rows of its own, and not the training:
    the run folder has all of them.
    """
    if not names or not is_main_process():
        yield lambda _metrics, _step: None
        return
    from accelerate import Accelerator

    called = f"--trackers {', '.join(names)}"
    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    try:
        accelerator.init_trackers("poise", config={name: _plain(value) for name, value in settings.items()})
    except Exception as error:  # noqa: BLE001  whatever a service's package raises
        raise PoiseError(f"{called}: {_said(error)}") from None
    try:
        yield _Forgiving(lambda metrics, step: accelerator.log(flat(metrics), step=step), called)
    finally:
        # Not by `end_training`: it destroys the group of this process, which the others wait in.
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001  as in `_Forgiving`
                console.print(f"{called}: its end is not told: {_said(error)}", markup=False, soft_wrap=True)


class _Forgiving:
    """`track` of a service that may be away for a while. After the n-th failure in a row it is left alone for 2ⁿ - 1
    rows, at most _REST: each try may wait for minutes."""

    def __init__(self, track: Track, called: str):
        self._track, self._called, self._failures, self._rest = track, called, 0, 0

    def __call__(self, metrics: Json, step: int) -> None:
        if self._rest:
            self._rest -= 1
            return
        try:
            self._track(metrics, step)
        except Exception as error:  # noqa: BLE001  whatever a service's package raises
            if not self._failures:
                line = f"{self._called}: step {step} is not told, and perhaps later ones: {_said(error)}"
                console.print(line, markup=False, soft_wrap=True)
            self._failures += 1
            self._rest = min(2**self._failures - 1, _REST)
        else:
            self._failures = 0


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


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
