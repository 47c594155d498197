"""Reward models for other engines, over HTTP: `poise serve`, and a client that imports no model."""
