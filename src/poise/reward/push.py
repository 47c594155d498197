"""`poise push`: a reward model on the model hub, for anybody's `from_pretrained`."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, get_token

from poise.errors import PoiseError, first_line
from poise.models.reward_model import checkpoint_folder
from poise.reward.config import PushConfig as Config
from poise.runtime.progress import console

# What a reward model is made of. Anything else in the folder, data and optimizer states included, stays here.
FILES = (
    "config.json", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "poise/last_layer.safetensors", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "README.md", "calibration.png",
)  # fmt: skip


def run(config: Config) -> str:
    """Upload; returns the address."""
    folder = Path(checkpoint_folder(config.reward))
    files = checkpoint_files(folder)
    user, _, name = config.repo.partition("/")
    if not user or not name:
        raise PoiseError(f"--repo {config.repo} is not of the form user/name")
    if get_token() is None:
        raise PoiseError("no token for the model hub: log in with `hf auth login`")
    try:
        hub = HfApi()
        address = str(hub.create_repo(config.repo, private=config.private, exist_ok=True))
        hub.upload_folder(
            repo_id=config.repo, folder_path=folder, allow_patterns=files, commit_message="Upload reward model"
        )
    except Exception as error:  # noqa: BLE001  the hub client's kinds of errors change from version to version
        raise PoiseError(
            f"cannot upload to {config.repo}: {first_line(error)}; `hf auth whoami` shows who is logged in"
        ) from None
    console.print(f"{len(files)} files uploaded: {address}")
    return address


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that belong to its reward model. PoiseError if there is none."""
    settings = folder / "config.json"
    if not settings.exists() or "poise" not in json.loads(settings.read_text(encoding="utf-8")):
        raise PoiseError(f"{folder} is not a reward model: no config.json with a `poise` block")
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in paths if any(fnmatchcase(name, known) for known in FILES))
    if not any(fnmatchcase(name, "*model*.safetensors") for name in names):
        raise PoiseError(f"{folder} is not a reward model: it has no model.safetensors")
    return names
