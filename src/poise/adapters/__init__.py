"""Other projects' contracts, each confined to its own file."""
