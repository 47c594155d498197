"""`python -m poise.cli COMMAND`, for launchers that start modules."""

import sys

from poise.cli.main import main

sys.exit(main())
