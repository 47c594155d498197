"""Other projects contracts, one file a project: TRL, lm-evaluation-harness."""
