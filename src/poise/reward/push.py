"""`poise push`: a reward model on the model hub, for anybody's `from_pretrained`."""

import functools
import json
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi, get_token

from poise.errors import PoiseError, first_line
from poise.models.formats import checkpoint_folder
from poise.reward.config import PushConfig as Config
from poise.runtime.folders import own_file
from poise.runtime.progress import console
from poise.runtime.records import parse_json, read_object

# What a reward model is made of. Anything else in the folder, data and optimizer states included, stays here.
FILES = (
    "config.json", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "poise/last_layer.safetensors", "poise/reference.safetensors", "poise/heads.safetensors", "poise/heads.json",
    "adapter_config.json", "adapter_model.safetensors", "adapters/head_*/adapter_config.json",
    "adapters/head_*/adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "README.md", "calibration.png",
)  # fmt: skip

# Vocabularies: megabytes of tokens, some of which look like paths.
_LARGE_JSON = {"tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"}
_LARGE_JSON |= {"model.safetensors.index.json"}
# Settings that name a model by its hub id or by its folder.
_NAMES = {"base_model_name_or_path", "_name_or_path", "name_or_path"}


def run(config: Config) -> str:
    """Upload; returns the address."""
    config.check()
    folder = Path(checkpoint_folder(config.reward))
    files = checkpoint_files(folder)
    if get_token() is None:
        raise PoiseError("no token for the model hub: log in with `hf auth login`")
    console.print(f"{folder} to {config.repo}, {len(files)} files:", markup=False, soft_wrap=True)
    for name in files:
        console.print(f"  {name}", markup=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = without_paths(folder, files, Path(scratch))
        try:
            hub = HfApi()
            address = str(hub.create_repo(config.repo, private=config.private, exist_ok=config.existing))
            hub.upload_folder(
                repo_id=config.repo, folder_path=prepared, allow_patterns=files, commit_message="Upload reward model"
            )
        except Exception as error:  # noqa: BLE001  the hub client's kinds of errors change from version to version
            if not config.existing and getattr(getattr(error, "response", None), "status_code", 0) == 409:
                raise PoiseError(f"{config.repo} exists already; --existing uploads into it") from None
            raise PoiseError(
                f"cannot upload to {config.repo}: {first_line(error)}; `hf auth whoami` shows who is logged in"
            ) from None
    console.print(f"{len(files)} files uploaded: {address}")
    return address


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that belong to its reward model. PoiseError if there is none."""
    settings = read_object(folder / "config.json", strict=False) if (folder / "config.json").exists() else {}
    if "poise" not in settings:
        raise PoiseError(f"{folder} is not a reward model: no config.json with a `poise` block")
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in paths if any(fnmatchcase(name, known) for known in FILES))
    if not any(fnmatchcase(name, "*model*.safetensors") for name in names):
        raise PoiseError(f"{folder} is not a reward model: it has no model.safetensors")
    for name in names:
        own_file(folder, name)
    return names


def without_paths(folder: Path, names: list[str], scratch: Path) -> Path:
    """The folder to upload: `folder` itself, or `scratch` if texts of it name folders of this machine.

    In `scratch` these texts are written anew: values of JSON settings keep the last part of a path, and cards leave
    out the current, the home and the model's own folder. All other files are links.
    """
    changed: dict[str, str] = {}
    for name in names:
        if (folder / name).suffix == ".json" and name not in _LARGE_JSON:
            changed[name] = _settings_without_paths(folder, name)
        elif name.endswith((".md", ".jinja")):
            text = (folder / name).read_text(encoding="utf-8", errors="surrogateescape")
            here = {f"{place}/" for place in (Path.cwd(), Path.home(), folder.resolve().parent) if len(place.parts) > 1}
            changed[name] = functools.reduce(lambda left, place: left.replace(place, ""), sorted(here)[::-1], text)
    changed = {name: text for name, text in changed.items() if text}
    changed = {
        name: text for name, text in changed.items()
        if text.encode("utf-8", "surrogateescape") != (folder / name).read_bytes()
    }  # fmt: skip
    if not changed:
        return folder
    for name in names:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        if name in changed:
            (scratch / name).write_text(changed[name], encoding="utf-8", errors="surrogateescape")
        else:
            (scratch / name).symlink_to((folder / name).resolve())
    console.print(f"uploaded without paths of this machine: {', '.join(sorted(changed))}", markup=False, soft_wrap=True)
    return scratch


def _settings_without_paths(folder: Path, name: str) -> str:
    """A JSON file's text, rewritten only if one of its values is a path of this machine."""
    text = (folder / name).read_text(encoding="utf-8")
    try:
        settings = parse_json(text)
    except ValueError:
        raise PoiseError(f"{folder / name} is not JSON") from None
    plain = _plain(settings)
    return text if plain == settings else json.dumps(plain, indent=2, ensure_ascii=False)


def _plain(value: Any, key: str = "") -> Any:
    """A JSON value, with the last part only of what is a path."""
    if isinstance(value, dict):
        return {name: _plain(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, key) for item in value]
    if isinstance(value, str) and _is_path(value, key):
        return PurePath(value).name
    return value


def _is_path(value: str, key: str) -> bool:
    """An absolute path of several parts, or, where settings name a model or a file, one that is here."""
    if key == "chat_template" or "\n" in value:
        return False
    absolute = value.startswith(("/", "~/")) and len(PurePath(value).parts) > 2
    return absolute or (key.endswith(("path", "file")) and value.startswith(".")) or (key in _NAMES and _is_here(value))


def _is_here(value: str) -> bool:
    return len(PurePath(value).parts) > 1 and Path(value).exists()
