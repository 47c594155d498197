"""SkyRL's training with rewards of `poise serve`: its own entry point, once the environment is known to it.

python examples/skyrl_poise.py environment.env_class=poise …

Every other option is SkyRL's own; docs/start/engines.md has a whole command.
"""

import sys

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import initialize_ray, validate_cfg
from skyrl_gym.envs import register


@ray.remote(num_cpus=1)
def train(config: SkyRLTrainConfig) -> None:
    """Registers the environment where episodes run: in the process of SkyRL's controller."""
    register(id="poise", entry_point="poise.integrations.skyrl_env:PoiseEnv")
    BasePPOExp(config).run()


if __name__ == "__main__":
    config = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(config)
    initialize_ray(config)
    ray.get(train.remote(config))
