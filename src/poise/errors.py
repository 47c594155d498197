"""The one exception a user is meant to see."""


class PoiseError(ValueError):
    """Bad input or an unmet requirement: one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
