"""A toy problem whose optimum is known, and PPO and robust rewards compared with it."""
