"""Silence of the libraries' own bars, reports and deprecations while models and data sets load."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence of the libraries' own progress bars, load reports and deprecations: ours say what matters."""
    import transformers

    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT, of a base model whose config it cannot fetch; the vocabulary is never changed here.
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
