"""The one place where an error becomes what a user sees: one line and an exit status.

    2     bad input, an unmet requirement, or the machine's trouble: unreadable, unwritable, full, out of memory
    1     a fault of this project; the line says where the traceback is
    130   interrupted

With POISE_DEBUG=1 the traceback of every error is shown too.
"""

import contextlib
import errno
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType

from poise.errors import PoiseError, first_line
from poise.runtime.display import say
from poise.runtime.folders import without_leftovers
from poise.runtime.processes import several

DONE, FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Libraries whose errors tell of the input that was given to them. An error of torch may as well be a fault of ours.
_READERS = {
    "accelerate", "csv", "datasets", "gguf", "gzip", "huggingface_hub", "httpx", "jinja2", "json", "lm_eval", "lzma",
    "bz2", "peft", "pyarrow", "requests", "safetensors", "safetensors_rust", "tokenizers", "transformers", "trl",
    "tyro", "urllib", "yaml", "zipfile", "zlib",
}  # fmt: skip
# Packages that only some commands need, by the extra that installs them.
_EXTRAS = {
    "lm_eval": "eval", "prometheus_client": "serve", "pydantic": "serve", "starlette": "serve", "trl": "trl",
    "uvicorn": "serve",
}  # fmt: skip
# What gloo and NCCL say to the processes that wait for one that has ended.
_OTHERS_ENDED = ("connection closed by peer", "connection reset by peer", "ncclremoteerror", "remote process exited")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def exit_status(error: BaseException) -> int:
    """Say an error in one line on stderr; returns the exit status of the process."""
    if os.environ.get("POISE_DEBUG") == "1":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        say("poise: interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        leave_stdout()
    if line := _of_input(error):
        say(f"poise: {line}")
        return BAD_INPUT
    say(f"poise: {type(error).__name__}: {first_line(error)}; this is a fault of poise, {_traceback_file(error)}")
    return FAULT


def leave_stdout() -> None:
    """Print to nowhere from now on: what read stdout has ended, and Python would fail again at its exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_input(error: BaseException) -> str:
    """What is wrong with the input or the machine, in one line; empty for an error that is a fault of ours."""
    if isinstance(error, PoiseError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "what read this output has ended; nothing more is written there"
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return f"out of memory ({first_line(error)}); take smaller batches, shorter texts or a smaller model"
    if several() and isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OTHERS_ENDED):
        return "another process of this run has ended, and says why in a line of its own; this one ends with it"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read"
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8 text: {error.reason} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("poise"):
        extra = _EXTRAS.get(error.name.partition(".")[0])
        return f"the package {error.name} is not installed" + (f': pip install "poise-rlhf[{extra}]"' if extra else "")
    if isinstance(error, Exception) and (library := _library(error)):
        return f"{library}: {type(error).__name__}: {first_line(error)} (POISE_DEBUG=1 shows where)"
    return ""


def _of_the_system(error: OSError) -> str:
    names = [without_leftovers(str(name)) for name in (error.filename, error.filename2) if name is not None]
    hint = {errno.ENOSPC: "; make room and start again, what was saved is kept", errno.EACCES: ""}.get(
        error.errno or 0, ""
    )
    return f"{': '.join([*names[:1], error.strerror or type(error).__name__])}{hint}"


def _library(error: Exception) -> str:
    """The library that raised an error, if it is one that reads input."""
    raised_in = type(error).__module__.partition(".")[0]
    if raised_in in _READERS:
        return raised_in
    last = _last_module(error.__traceback__)
    return last if last in _READERS else ""


def _last_module(frame: TracebackType | None) -> str:
    name = ""
    while frame is not None:
        name = str(frame.tb_frame.f_globals.get("__name__", ""))
        frame = frame.tb_next
    return name.partition(".")[0]


def _traceback_file(error: BaseException) -> str:
    """Where the traceback was written: a long run must not have to fail again to be understood."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="poise-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "POISE_DEBUG=1 shows the traceback"
    return f"please report it with {Path(file.name)}"
