"""Reward models: training, evaluation, ensembles, export. Nothing here imports `poise.policy`."""
