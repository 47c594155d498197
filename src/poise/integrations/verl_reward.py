"""A Poise reward for verl 0.9.1, as its custom reward function:

    reward.custom_reward_function.path=pkg://poise.integrations.verl_reward
    reward.custom_reward_function.name=compute_score      # or compute_score_sync

verl does not give the prompt to a reward function, so the data needs it in a column: `extra_info.prompt`, as text or
as turns. A reward manager needs no such column: see poise.integrations.verl_manager. The answer has the same keys for
every sample, which verl demands. Do not switch on `reward.reward_model.enable`: verl's own reward-model path reads the
last raw std at the wrong token.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from poise.errors import PoiseError
from poise.integrations.trl_turns import as_prompt
from poise.runtime.settings import shown
from poise.serve.client import own_client as _client
from poise.serve.client import scalars


async def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    """`score`, and every head and uncertainty. Raises PoiseError if there is no reward; verl must not train on 0."""
    rows = await _client().ascore(_prompt(extra_info, options), [solution_str])
    return answer_of(rows[0])


def compute_score_sync(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    """As `compute_score`, for code that does not await."""
    return answer_of(_client().score(_prompt(extra_info, options), [solution_str])[0])


def answer_of(row: dict[str, Any]) -> dict[str, float]:
    """One row of the server as verl takes it: `score`, and the other numbers by name."""
    numbers = scalars(row)
    return {"score": numbers.pop("reward"), **numbers}


def refuse_own_model() -> NoReturn:
    """Raise PoiseError: beside verl's own reward model Poise would not be asked, or not for what is trained on."""
    raise PoiseError("switch off reward.reward_model.enable: verl's own reward model would read another number")


def check_turns(number: Any) -> None:
    """Raise PoiseError for an answer in several turns. number: of all turns, as verl counts them; None if not told."""
    try:
        several = number is not None and int(number) > 2
    except (TypeError, ValueError):
        raise PoiseError(f"the number of an answer's turns must be a whole number, got {shown(number)}") from None
    if several:
        raise PoiseError(
            "verl gives the turns of an agent and its tools as one text, which no reward model has seen in training: "
            "use a single-turn agent loop"
        )


def _prompt(extra_info: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    if options.get("reward_router_address"):
        refuse_own_model()
    given = {} if extra_info is None else extra_info
    if not isinstance(given, Mapping):
        raise PoiseError(f"extra_info must have columns, among them prompt; it is of type {type(given).__name__}")
    check_turns(given.get("num_turns"))
    prompt = given.get("prompt")
    if prompt is None:
        raise PoiseError(
            "verl gives no prompt to a reward function: put it into extra_info.prompt of the data, or use the reward "
            "manager, poise.integrations.verl_manager"
        )
    return as_prompt(prompt)  # an array, where it comes from Parquet
