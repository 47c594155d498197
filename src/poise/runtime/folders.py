"""Whose a folder is, who writes in it now, and which names lead out of it.

FOLDER/.poise   marks a folder that Poise made and may write in; the process that writes in it holds a lock on this file
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from poise.errors import PoiseError, first_line

MARK = ".poise"
# A folder with one of these was made by a version that did not write the mark.
_OLDER_MARKS = ("config.yaml", "study.json")

# Locks of this process: open files by folder. The system frees them when the process ends, also by kill -9.
_held: dict[Path, int] = {}


def _leave_locks_to_the_parent() -> None:
    """A forked process, such as one that reads data, must not hold a lock for longer than its parent lives."""
    for place in list(_held):
        os.close(_held.pop(place))


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def inside(folder: Path, name: object) -> Path:
    """The path of a file in `folder` whose name comes from a file, such as a weight map.

    Raises PoiseError for a name that leads out of the folder: absolute, with `..`, or through a symbolic link to
    another folder. A link of a single file stays allowed where it is read, as in the hub's cache.
    """
    path = folder / str(name)
    plain = isinstance(name, str) and name and "\0" not in name and not name.startswith("/")
    if not plain or ".." in Path(str(name)).parts or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise PoiseError(f"{folder} names a file outside itself: {name!r}")
    return path


def own_file(folder: Path, name: object) -> Path:
    """`inside`, and the file itself lies in the folder too: what is copied or uploaded follows no link out of it.

    The hub's cache keeps the files of a snapshot as links to its blobs, which are taken.
    """
    path = inside(folder, name)
    home = folder.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise PoiseError(f"{path} is a symbolic link out of the folder; copy the file there instead")
    return path


# ---- whose a folder is ----


def is_ours(folder: Path) -> bool:
    """May a run write in this folder? It is missing, empty, or Poise made it."""
    if not folder.is_dir():
        return not folder.exists()
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    return not names or MARK in names or any(name in names for name in _OLDER_MARKS)


def refuse_foreign(folder: Path) -> None:
    """Raise PoiseError for a file, and for a folder that holds something that Poise did not write."""
    if not is_ours(folder):
        what = "holds files that no run of Poise wrote" if folder.is_dir() else "is a file"
        raise PoiseError(f"--output {folder} {what}; choose another folder")


def own(folder: Path) -> None:
    """Make the folder, or take an empty or earlier one, and mark it as made by Poise; PoiseError as above."""
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    if not mark.exists():
        mark.touch()


def lock(folder: Path) -> None:
    """Be the one process that writes in an own folder, until the process ends or `unlock` is called.

    Raises PoiseError if another process is. On file systems without locks nothing is checked.
    """
    place = folder.resolve()
    if place in _held:
        if os.fstat(_held[place]).st_nlink:
            return
        unlock(folder)  # deleted and made again
    file = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise PoiseError(
                f"another process is writing in {folder}; wait for it, or choose another --output"
            ) from None
        return
    if not os.fstat(file).st_nlink:  # the folder was deleted, and perhaps made again, in between
        os.close(file)
        raise PoiseError(f"{folder} was deleted while it was opened; start again")
    _held[place] = file


def unlock(folder: Path) -> None:
    """Let other processes write in the folder."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def refuse_deleted(folder: Path) -> None:
    """Raise PoiseError if a folder that this process locked was deleted since: what is written now is no whole run."""
    file = _held.get(folder.resolve())
    if file is not None and not os.fstat(file).st_nlink:
        raise PoiseError(f"{folder} was deleted while the run wrote in it; start again")


# ---- files and folders that appear whole ----


def refuse_device(path: Path) -> None:
    """Raise PoiseError where a file or folder cannot be made, or would take the place of a device, FIFO or stream.

    A rename onto /dev/null or /dev/stdout replaces it, for every process of the machine, if the user may do so.
    """
    if "\0" in str(path):
        raise PoiseError(f"{str(path)!r} cannot be the name of a file: it holds a zero byte")
    if path.parts[:1] == ("~",):
        raise PoiseError(f"{path}: ~ is not read as the home folder here; write the folder's whole name")
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
    if there != path and not there.is_dir():
        raise PoiseError(f"{path} cannot be made: {there} is no folder")
    if there != path and not os.access(there, os.W_OK):
        raise PoiseError(f"{path} cannot be made: nothing may be written into {there}")
    if path.is_symlink() and not path.exists():
        raise PoiseError(f"{path} is a link to nothing; delete it, or choose another name")
    try:
        place = path.parent.resolve()
        streams = place == Path("/dev") or place.parts[1:2] in (("proc",), ("sys",))
        other = path.exists() and not (path.is_file() or path.is_dir())
    except OSError as error:
        raise PoiseError(f"{str(path)!r} cannot be the name of a file: {first_line(error)}") from None
    if streams or other:
        raise PoiseError(f"{path} is no place for a file or folder, but a device or a stream; choose another name")


def partial_name(path: Path) -> Path:
    """Where this process prepares `path`: a hidden neighbor, which `clear_leftovers` knows if the process is killed."""
    return path.with_name(f"{_leftover_prefix(path.name)}{os.getpid()}")


def clear_leftovers(path: Path) -> None:
    """Delete what killed processes of this machine left of `path`; a folder that they had moved aside comes back."""
    prefix = _leftover_prefix(path.name)
    for left in sorted(path.parent.glob(f".{_escaped(path.name)}.poise-*")):
        number = left.name.removeprefix(prefix).removesuffix(".old")
        # In a container each process has the same number: one's own is of a process before.
        if not number.isdigit() or (int(number) != os.getpid() and _is_alive(int(number))):
            continue
        if left.name.endswith(".old") and not path.exists():
            os.replace(left, path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def write_file_atomic(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write; it becomes `path` only if the block succeeds."""
    refuse_device(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    partial = partial_name(path)
    try:
        yield partial
        follow_umask(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` (replacing an old one) only if the block succeeds.

    Files in it get the rights that the umask gives new files; libraries write some for their user alone.
    """
    refuse_device(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    scratch = partial_name(path)
    scratch.mkdir()
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file() and not file.is_symlink():
                follow_umask(file)
        if path.exists():
            retired = scratch.with_name(f"{scratch.name}.old")
            os.replace(path, retired)
            os.replace(scratch, path)
            shutil.rmtree(retired)
        else:
            os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def follow_umask(file: Path) -> None:
    """Give a file the rights of any new file: safetensors and `tempfile` write for their user alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _leftover_prefix(name: str) -> str:
    return f".{name}.poise-{socket.gethostname()}-"


def is_leftover(name: str) -> bool:
    """Is it the name of what a process prepares, or prepared when it was killed?"""
    return name.startswith(".") and ".poise-" in name


def without_leftovers(path: str) -> str:
    """A path as its user knows it, with the names of what it becomes in place of what a process prepares.

    >>> without_leftovers("runs/.out.poise-host-12/config.json")
    'runs/out/config.json'
    """
    return re.sub(r"(^|/)\.([^/]+)\.poise-[^/]+", r"\1\2", path)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
