"""The shipped accelerate configs: read by accelerate's own loader and launcher, down to what the processes will see."""

import os
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import poise
from poise.errors import PoiseError
from poise.runtime import distributed as processes

FOLDER = Path(poise.__file__).parent / "runtime" / "accelerate_configs"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero3": DistributedType.DEEPSPEED,
}


def loaded(name: str) -> ClusterConfig:
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


@pytest.fixture(params=sorted(KINDS))
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a config, in the environment that `accelerate launch` would give its processes."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    file = str(FOLDER / f"{request.param}.yaml")
    # Port 0: the default one may be taken, and accelerate warns of that.
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0", "-m", "poise.cli"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(options))
    args.deepspeed_fields_from_accelerate_config = ""
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for key, value in env.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    return request.param


def test_every_file_is_of_a_known_kind() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_loads_it(name: str) -> None:
    config = loaded(name)  # refuses keys that it does not know
    assert config.distributed_type == KINDS[name]
    assert config.mixed_precision == "bf16"
    assert bool(config.fsdp_config) == (name == "fsdp2")
    assert bool(config.deepspeed_config) == (name == "zero3")
    assert config.num_processes == -1  # to be said at every launch


def test_each_kind_has_its_fields() -> None:
    sharded = loaded("fsdp2").fsdp_config
    assert (sharded["fsdp_version"], sharded["fsdp_reshard_after_forward"]) == (2, True)
    zero = loaded("zero3").deepspeed_config
    assert (zero["zero_stage"], zero["zero3_save_16bit_model"]) == (3, True)


@pytest.mark.slow
def test_the_launcher_understands_it(launched: str) -> None:
    """What the processes will make of the environment, not what the file seems to say."""
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (os.environ.get("ACCELERATE_USE_FSDP") == "true") == (launched == "fsdp2")
    assert (os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true") == (launched == "zero3")
    if launched == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert plugin.cpu_ram_efficient_loading is False  # or reward models would be empty on all processes but one
        assert plugin.auto_wrap_policy is not None
    elif launched == "zero3":
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
        # left to the Trainer, which knows the batch sizes
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == ("auto", "auto")


@pytest.mark.slow
def test_policies_are_not_sharded(launched: str) -> None:
    if launched == "ddp":
        processes.refuse_sharding("no")
        return
    with pytest.raises(PoiseError, match="was asked for in accelerate's settings: launch otherwise") as caught:
        processes.refuse_sharding("launch otherwise")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith({"fsdp2": "FSDP ", "zero3": "DeepSpeed "}[launched])


@pytest.mark.parametrize("value", ["false", "", "False"])
def test_without_sharding_nothing_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, value)
    processes.refuse_sharding("no")


@pytest.mark.parametrize("name", KINDS)
def test_each_says_which_commands_run_under_it(name: str) -> None:
    comments = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.removeprefix("#").strip() for line in comments)
    assert f"--config_file {name}.yaml" in text
    assert "train-reward" in text
    assert ("Not for train-policy" in text) == (name != "ddp")
    assert "not yet run on" in text
