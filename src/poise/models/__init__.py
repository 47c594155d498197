"""What text and weights become: loading, chat format, reward-model checkpoints, the scorer, the policy."""
