"""Rooms put together: studies, comparisons, best-of-n, the quickstart. Only here is gold read."""
