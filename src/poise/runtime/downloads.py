"""Files that the quickstart needs, taken from the Python package registry and kept in the user's cache.

pip does the download, so mirrors, proxies and certificates work as the user has set them; pip checks the hash
before it runs anything of the package.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from poise.errors import PoiseError
from poise.runtime.progress import console
from poise.runtime.run_folder import write_folder_atomic


def cache_folder() -> Path:
    """Where fetched and converted files live: $POISE_CACHE, or the platform's user cache.

    Raises PoiseError for a user without a home folder, as in some containers.
    """
    try:
        folder = os.environ.get("POISE_CACHE") or platformdirs.user_cache_dir("poise-rlhf")
    except RuntimeError:
        folder = "~"
    if folder.startswith("~"):  # what older versions of platformdirs leave
        raise PoiseError("this user has no home folder to keep a cache in; set POISE_CACHE to a folder for it")
    return Path(folder)


def cached(name: str, build: Callable[[Path], None], whole: Callable[[Path], bool] = Path.exists) -> Path:
    """The cache folder `name`, built once by `build(empty_folder)`; a killed build leaves nothing behind.

    whole: is the folder's content what was built? It is asked on every use, and a damaged folder is built again.
    Raises PoiseError if what `build` made is not whole either.
    """
    folder = cache_folder() / name
    if not folder.exists() or not whole(folder):
        if folder.exists():
            console.print(f"{folder} is damaged; it is fetched again", markup=False)
        with console.status(f"fetching {name} (once)"), write_folder_atomic(folder) as scratch:
            build(scratch)
            if not whole(scratch):
                raise PoiseError(f"what was fetched as {name} is not what this version of poise knows")
    return folder


@contextlib.contextmanager
def package_file(requirement: str, sha256: str, *, source: bool = False) -> Iterator[Path]:
    """Download one package file, `requirement` as in `name==1.2`, and yield its path until the block ends.

    source: the source distribution instead of the wheel.
    Raises PoiseError if the registry cannot be reached or the file is not the one we know.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch, "pins.txt")
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
        # Even to read a source package's name pip builds its metadata; the build tools are not pinned by us.
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        done = subprocess.run(
            [*command, "--require-hashes", "-r", str(pins), "-d", scratch],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        files = [path for path in Path(scratch).iterdir() if path != pins]
        if done.returncode or len(files) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no file came"]
            raise PoiseError(
                f"cannot get {requirement} from the package registry ({lines[0].removeprefix('ERROR: ')}); "
                f"check the network and `{Path(sys.executable).name} -m pip --version`"
            )
        yield files[0]
