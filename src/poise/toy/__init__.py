"""A toy problem whose optimum is known, and PPO and robust rewards held against it."""
