"""What is wrong with a model folder, from its JSON files alone, before torch is imported.

These checks refuse early and in one line what could not be loaded anyway; `poise.models.loading` makes sure of the
weights. Of a name that may be a hub id, the folder in the hub's cache is checked, or the config.json on the hub.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

from poise.errors import PoiseError, first_line
from poise.models.choices import DEFAULT_MODEL, HEAD_KINDS
from poise.models.formats import ENSEMBLE_FILE, checkpoint_folder, num_labels_of, read_ensemble, read_head_block
from poise.models.run_heads import VALIDATOR
from poise.models.template_trial import try_template
from poise.runtime.hub import on_hub
from poise.runtime.records import parse_json, read_object
from poise.runtime.run_kinds import told_of, why_without

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how the classes of language models end
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ADAPTERS = "adapter_config.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"

# The package that reads each kind of quantized weights.
_QUANTIZERS = {
    "aqlm": "aqlm", "auto-round": "auto_round", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors", "eetq": "kernels", "fbgemm_fp8": "fbgemm_gpu", "gptq": "gptqmodel",
    "higgs": "flute", "hqq": "hqq", "quanto": "optimum.quanto", "quark": "quark", "spqr": "spqr_quant",
    "torchao": "torchao", "vptq": "vptq",
}  # fmt: skip
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "head_dim", "n_embd", "n_layer", "n_head", "n_positions", "ffn_dim", "num_labels",
)  # fmt: skip
_FEW_BITS = re.compile(r"F8\w*|F[46](_\w+)?|[IU][48]")  # of a number, as safetensors calls its kind
_LONGEST_HEADER = 10**8  # bytes; safetensors has the same limit
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "speech_config", "image_token_id")


def check_model(path: str, wanted: str = "a language model") -> None:
    """Raise PoiseError, one line, for a folder that holds no language model that can be read here.

    wanted: what else it should be, for the message.
    """
    folder, config = _found(path)
    if folder is None:
        if config:
            _check_config(Path(path) / _CONFIG, config)
        return
    if not (folder / _CONFIG).exists():
        raise PoiseError(why_no_model(path, wanted))
    _check_config(folder / _CONFIG, read_object(folder / _CONFIG, strict=False))
    if (folder / _GENERATION).exists():  # transformers would pass over a damaged one, and its end tokens with it
        _check_ends(folder / _GENERATION, read_object(folder / _GENERATION, strict=False).get("eos_token_id"))
    _check_files(folder)
    check_precision(str(folder))
    _check_template(folder)


def check_language_model(path: str) -> None:
    """As `check_model`, and for a reward model, which writes nothing, and for a policy's adapters."""
    for place in (Path(path), Path(path) / "policy"):
        if (place / _ADAPTERS).exists():
            refuse_reward_adapters(place)
            raise PoiseError(
                f"{path} holds a policy's adapters, not a whole model; `poise merge {path} --output FOLDER` folds them "
                f"into theirs: name that folder"
            )
    check_model(path)
    if is_classifier(config_of(path)):
        raise PoiseError(f"{path} is a reward model, not a language model; name the model whose texts it scores")


def check_policy(path: str) -> None:
    """As `check_language_model`; of a policy's adapters, or of a run that holds them, the model they belong to."""
    folder = Path(path)
    if not (folder / "policy").exists() and "train-policy" in told_of(path):
        raise PoiseError(f"{path} has no policy: {why_without(folder, 'policy')}")
    adapters = next((place for place in (folder / "policy", folder) if (place / _ADAPTERS).exists()), None)
    if adapters is None:
        check_language_model(str(folder / "policy") if (folder / "policy" / _CONFIG).exists() else path)
        return
    refuse_reward_adapters(adapters)
    base = ""
    try:
        base = adapted_model(adapters)
        check_language_model(base)
    except PoiseError as error:
        # A folder that was named from where the training was started, as far as a name can tell.
        where = "start this in the directory in which it was trained, or " if base.startswith(".") else ""
        raise PoiseError(
            f"no base model of {adapters}: {error}; {where}write where it is into {adapters / _ADAPTERS}"
        ) from None


def refuse_reward_adapters(adapters: Path) -> None:
    """Raise PoiseError for adapters of a classifier, as peft's task_type says: they write nothing."""
    if read_object(adapters / _ADAPTERS, strict=False).get("task_type") == "SEQ_CLS":
        raise PoiseError(
            f"{adapters} holds no LoRA adapters of a language model, but of a reward model (task_type SEQ_CLS); reward "
            f"models are for `poise export`, and a language model is needed here"
        )


def adapted_model(adapters: Path) -> str:
    """The model that a policy's adapters were trained on, as their folder names it; PoiseError for other adapters."""
    refuse_reward_adapters(adapters)
    settings = read_object(adapters / _ADAPTERS, strict=False)
    # Many scripts give peft no task_type; adapters of a classifier are then refused for its head, or for their base.
    if settings.get("peft_type") != "LORA" or settings.get("task_type") not in ("CAUSAL_LM", None):
        raise PoiseError(f"{adapters} holds no LoRA adapters of a language model; reward models are for `poise export`")
    if not (adapters / "adapter_model.safetensors").exists():
        raise PoiseError(f"{adapters} has no adapter_model.safetensors")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise PoiseError(f"{adapters / _ADAPTERS} does not say of which model: it has no base_model_name_or_path")
    return base


def config_of(path: str) -> dict[str, Any]:
    """The config.json of a model folder, or of a hub id as far as it is known; otherwise nothing."""
    folder, config = _found(path)
    if folder is not None:
        return read_object(folder / _CONFIG, strict=False) if (folder / _CONFIG).exists() else {}
    return config


def is_classifier(config: dict[str, Any]) -> bool:
    """Does a config.json say that its model has labels, as reward models have?"""
    return "poise" in config or _class_of(config).endswith("ForSequenceClassification")


def check_tokenizer(path: str) -> None:
    """Raise PoiseError, one line, for a model whose tokenizer cannot be had: a language model or a reward model."""
    folder, _ = _found(path)
    if folder is not None:
        checkpoint = Path(checkpoint_folder(str(folder)))
        if not (checkpoint / _CONFIG).exists():
            raise PoiseError(why_no_model(path))
        _check_tokenizer([file.name for file in checkpoint.iterdir()], checkpoint)


def check_shape(path: str) -> None:
    """Raise PoiseError, one line, for a model of which config.json cannot be had, or says what cannot be."""
    folder, config = _found(path)
    if folder is not None:
        if not (folder / _CONFIG).exists():
            raise PoiseError(why_no_model(path))
        config = read_object(folder / _CONFIG, strict=False)
    if config:
        _check_config((folder or Path(path)) / _CONFIG, config)


def check_layers(path: str, option: str, wanted: int) -> None:
    """Raise PoiseError for more layers than the model in a folder has, where its config.json says how many."""
    if not wanted:
        return
    config = config_of(path)
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    depth = next((config[name] for name in _DEPTHS if type(config.get(name)) is int), wanted)
    if wanted > depth:
        raise PoiseError(f"{option} must be at most {depth}, the layers of {path}, got {wanted}")


def check_reward_model(path: str) -> None:
    """Raise PoiseError, one line, for a folder that holds no reward model: none of ours, and no classifier.

    A `poise train-reward` run, an ensemble and adapters count as one.
    """
    folder, config = _found(path)
    if folder is None:
        if config:
            _check_config(Path(path) / _CONFIG, config)
            _check_labels(config, path)
        return
    if (folder / ENSEMBLE_FILE).exists():
        for member in read_ensemble(path).members:
            check_reward_model(member)
        return
    checkpoint = checkpoint_folder(str(folder))
    check_model(checkpoint, "a reward model")
    _check_labels(read_object(Path(checkpoint) / _CONFIG, strict=False), path)


def _check_labels(config: dict[str, Any], path: str) -> None:
    if "poise" not in config and _class_of(config).endswith(_WRITERS):
        raise PoiseError(
            f"{path} is a language model, not a reward model; `poise train-reward --model {path}` makes one of it, "
            f"or name a one-label classifier"
        )
    read_head_block(config.get("poise"), num_labels_of(config, path), path)


def _class_of(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def why_no_model(path: str, wanted: str = "a model folder") -> str:
    """One line for a folder without config.json. wanted: what it should be."""
    if (Path(path) / ENSEMBLE_FILE).exists():
        return f"{path} is an ensemble of reward models, not {wanted}"
    if (Path(path) / _ADAPTERS).exists():
        of_rewards = read_object(Path(path) / _ADAPTERS, strict=False).get("task_type") == "SEQ_CLS"
        how = "in peft, merge_and_unload" if of_rewards else "`poise merge` for a policy; in peft, merge_and_unload"
        which = "; they are a reward model's: of a `poise train-reward` run name the run" if of_rewards else ""
        return (
            f"{path} holds adapters without the config.json of their model: fold them into it and save the whole model "
            f"({how}){which}"
        )
    if told := told_of(path):
        if "train-reward" in told and wanted == "a reward model":
            return f"{path} holds no reward model: {why_without(Path(path), 'brme')}"
        return f"{path} is {told}, not {wanted}"
    if made := _of_run(Path(path)):
        return f"{path} has no config.json{made}"
    return f"{path} is not a model folder: it has no config.json"


def _found(path: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a model, also in the hub's cache; else the config.json on the hub, as far as it is known."""
    folder = _existing(path)
    if folder is not None or path == DEFAULT_MODEL:
        return folder, {}
    known = on_hub(path)
    return (known, {}) if isinstance(known, Path) else (None, known or {})


def _existing(path: str) -> Path | None:
    """The folder, or None for what may be a hub id. PoiseError for what can be neither."""
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, ValueError) as error:
        raise PoiseError(f"{path!r} cannot be the name of a model: {first_line(error)}") from None
    if exists:
        raise PoiseError(f"{path} is not a model folder: it is a file")
    if not _HUB_ID.fullmatch(path):
        raise PoiseError(f"model {path!r} is neither a local folder nor reachable on the model hub")
    return None


def _check_config(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise PoiseError(f"{path} has no model_type: it does not say what kind of model it is")
    known = _known_to_transformers(kind)
    if not known and "auto_map" in config:
        raise PoiseError(f"{path}: a model of type {kind!r} needs code of its own (auto_map), which is never run here")
    if not known:
        raise PoiseError(f"{path}: transformers knows no model of type {kind!r}; a newer version may")
    for name in _SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= 10**9):
            raise PoiseError(f"{path}: {name} must be a whole number of at least 1, got {str(value)[:60]}")
    if config.get("is_encoder_decoder") is True:
        raise PoiseError(f"{path}: a model of an encoder and a decoder; poise takes decoders only")
    if other := next((name for name in _OTHER_SENSES if config.get(name) is not None), None):
        raise PoiseError(f"{path}: a model that reads more than text ({other}); take the language model of its family")
    _check_quantization(path, config.get("quantization_config"))


def _check_ends(path: Path, ends: Any) -> None:
    several = ends if isinstance(ends, list) else [ends]
    if wrong := [end for end in several if end is not None and type(end) is not int]:
        raise PoiseError(
            f"{path}: eos_token_id must be a token's number or a list of numbers, got {str(wrong[0])[:60]!r}"
        )


def _known_to_transformers(kind: str) -> bool:
    """Does the installed transformers name this type of model? Read from its files: importing it takes seconds."""
    package = importlib.util.find_spec("transformers")
    if package is None or not package.origin:
        return True
    lists = list((Path(package.origin).parent / "models" / "auto").glob("*auto*.py"))
    return not lists or any(f'"{kind}"' in file.read_text(encoding="utf-8") for file in lists)


def _check_quantization(path: Path, how: Any) -> None:
    if how is None:
        return
    method = how.get("quant_method") if isinstance(how, dict) else None
    if not isinstance(method, str):
        raise PoiseError(f"{path}: quantization_config does not say by which method (quant_method)")
    package = _QUANTIZERS.get(method, "")
    if package and importlib.util.find_spec(package.partition(".")[0]) is None:
        raise PoiseError(
            f"{path}: the weights are quantized ({method}), and the package {package} is not installed; "
            f"take the model in full precision"
        )


def check_precision(folder: str) -> None:
    """Raise PoiseError, one line, for weights in 8 bits or fewer that config.json does not say how to read.

    They would be taken for numbers of the model, without the scales that belong to them.
    """
    if read_object(Path(folder) / _CONFIG, strict=False).get("quantization_config") is not None:
        return
    for file in sorted(Path(folder).glob("model*.safetensors")):
        for name, tensor in _header(file).items():
            kind = str(tensor.get("dtype")) if isinstance(tensor, dict) else ""
            if name.endswith("weight") and _FEW_BITS.fullmatch(kind):
                raise PoiseError(
                    f"{file}: {name} is quantized ({kind}), and config.json has no quantization_config that says how "
                    f"to read it; take the model in full precision"
                )


def stored_tensor(folder: str, name: str) -> Any:
    """A tensor as the safetensors files of a folder hold it. Raises PoiseError if they do not."""
    from safetensors import safe_open

    for path in Path(folder).glob("*.safetensors"):
        if name in _header(path):
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
    raise PoiseError(f"{folder} has no {name} in its safetensors files")


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors; nothing for a damaged one, which loading refuses."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            found = parse_json(stream.read(length)) if length <= _LONGEST_HEADER else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_files(folder: Path) -> None:
    names = [file.name for file in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        why = "; weights in pickle form are not read, save them as safetensors" if pickled else ""
        raise PoiseError(f"{folder} has no weights in safetensors form{why}{_of_run(folder)}")
    _check_tokenizer(names, folder)


def _check_tokenizer(names: list[str], folder: Path) -> None:
    tokenizers = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any(name in names for name in tokenizers):
        raise PoiseError(f"{folder} has no tokenizer: no tokenizer.json{_of_run(folder)}")


def _of_run(folder: Path) -> str:
    """What to do about a model folder that is not whole, where a run made it."""
    made = folder.name in (*HEAD_KINDS, VALIDATOR) and "train-reward" in told_of(folder.parent)
    return f": {why_without(folder.parent, f'a part of {folder.name}')}" if made else ""


def _check_template(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    saved = read_object(settings, strict=False) if settings.exists() else {}
    file = folder / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.exists() else saved.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise PoiseError(f"cannot read {file}: {first_line(error)}") from None
    if isinstance(template, str):
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        try_template(template, str(folder), {n: saved[n] for n in names if isinstance(saved.get(n), str)})
