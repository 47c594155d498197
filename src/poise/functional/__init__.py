"""The equations, as pure functions: objectives, losses, PPO, best-of-n, statistics, the monitor. No models inside."""
