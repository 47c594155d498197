"""`python -m poise COMMAND`, as `torchrun -m poise COMMAND` needs it."""

import sys

from poise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
