"""One short conversation through a chat template, in limited time: does it end, and does it write the answer?

Templates are programs of whoever made the model. transformers renders them without a time limit, so the trial comes
before a model is loaded. What a template refuses is left to the rows themselves: some refuse a system turn only.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

from poise.errors import PoiseError, first_line

SECONDS = 5.0
_QUESTION, _ANSWERS = "Is tea hot?", ("Mostly so.", "Hardly ever.")


def try_template(template: str, where: str, tokens: dict[str, str]) -> None:
    """Raise PoiseError, one line, for a template with a fault in itself.

    tokens: the tokenizer's special tokens by name, such as eos_token. `where` names the model in the message.
    """
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        if "generation" in str(error):  # a tag that transformers adds
            return
        raise PoiseError(f"the chat template of {where} is no template: {first_line(error)}") from None
    written = []
    for answer in _ANSWERS:
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": answer}]
        try:
            with time_limit(SECONDS):
                written.append(compiled.render(messages=turns, add_generation_prompt=False, **tokens))
        except TimeoutError:
            raise PoiseError(
                f"the chat template of {where} did not end within {SECONDS:g} s; use another tokenizer"
            ) from None
        except Exception:  # noqa: BLE001  a template may raise anything; the rows' own renderings will tell
            return
    if not any(text.strip() for text in written):
        raise PoiseError(f"the chat template of {where} writes nothing; use another tokenizer")
    if written[0] == written[1]:
        raise PoiseError(f"the chat template of {where} writes nothing of an answer; use another tokenizer")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in Python code that takes longer. Outside the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: Any) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    rest = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, before)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
