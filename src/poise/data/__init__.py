"""Preferences, prompts, evaluation sets and ratings: reading files and saying what is wrong with them."""
