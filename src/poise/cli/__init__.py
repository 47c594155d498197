"""The command line: `poise COMMAND`."""
