"""The one exception a user is meant to see, and how other errors become one line of it."""


class PoiseError(ValueError):
    """Bad input or an unmet requirement: one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says, without the paragraphs after it; its kind if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
