"""The contracts of other projects, one file each: TRL, lm-evaluation-harness."""
