"""What callers send, and what they get: our own form, OpenRLHF's and slime's."""

from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from poise.data.conversations import check_answer, text_of_parts, usual_role
from poise.data.raw import TwiceError, parsed_json
from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.models.chat_format import HfTokenizer
from poise.models.scorer import generated
from poise.runtime.run_folder import Json
from poise.serve.client import scalars
from poise.serve.rendered import sample_of_answer, sample_of_query, sample_of_text


class BadRequestError(PoiseError):
    """A request that is no request: status 400 or 422."""

    def __init__(self, line: str, status: int = 422):
        super().__init__(line)
        self.status = status


class Turn(BaseModel):
    """One turn of a conversation; other fields, such as tool calls, are given to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = Field(None, description="Text, or parts of type text")


class ScoreRequest(BaseModel):
    """One of: prompt with completion or completions; messages that end in the assistant's; text as rendered."""

    model_config = ConfigDict(extra="forbid")  # a field that nobody reads, such as a system turn, would change nothing
    prompt: str | list[Turn] | None = Field(None, description="Text, or turns")
    completion: str | None = None
    completions: list[str] | None = Field(None, description="Answers to the one prompt, which is read once for all")
    messages: list[Turn] | None = Field(None, description="A whole conversation; its last turn is scored")
    text: str | None = Field(None, description="A whole conversation as the reward model's chat template writes it")


class OpenRLHFRequest(BaseModel):
    """OpenRLHF's `--reward.remote_url`: query is prompt and answer together, both rendered by its chat template."""

    query: list[str]
    prompts: list[str]
    labels: list[Any] | None = None


class SlimeRequest(BaseModel):
    """slime's `--rm-type remote_rm`."""

    prompt: str | list[Turn]
    response: str
    label: Any = None


class Form(NamedTuple):
    """One endpoint: the request, its samples, and the answer made of their rows."""

    request: type[BaseModel]
    samples: Callable[[Any, HfTokenizer], list[Sample]]
    answer: Callable[[list[Json]], Json]
    summary: str


def read(form: Form, body: bytes, tokenizer: HfTokenizer, max_completions: int, max_characters: int) -> list[Sample]:
    """The samples of a request. Raises BadRequestError, one line that repeats nothing of a long body."""
    try:
        asked = form.request.model_validate_json(body)
        parsed_json(body.decode())  # pydantic takes the last of two values
    except TwiceError as error:
        raise BadRequestError(str(error), 400) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        line = f"{where}: {first['msg']}" if where else first["msg"]
        raise BadRequestError(line[:300], 400 if first["type"] == "json_invalid" else 422) from None
    try:
        samples = form.samples(asked, tokenizer)
    except PoiseError as error:
        raise BadRequestError(str(error)) from None
    if not samples:
        raise BadRequestError("there is nothing to score")
    if len(samples) > max_completions:
        raise BadRequestError(f"{len(samples)} completions in one request; send at most {max_completions}")
    longest = max(_length(sample) for sample in samples)
    if longest > max_characters:
        raise BadRequestError(f"a sample of {longest} characters; send at most {max_characters}")
    return samples


def _length(sample: Sample) -> int:
    prompt = sample.prompt if isinstance(sample.prompt, str) else "".join(t.get("content") or "" for t in sample.prompt)
    return max(len(prompt), len(sample.completion))


# ---- our own ----


def _asked(request: ScoreRequest, tokenizer: HfTokenizer) -> list[Sample]:
    given = {name for name in ("completion", "completions", "messages", "text") if getattr(request, name) is not None}
    if len(given) != 1:
        raise PoiseError("give one of completion, completions, messages, text")
    if (request.prompt is not None) != (given <= {"completion", "completions"}):
        raise PoiseError("a prompt goes with completion or completions, and with nothing else")
    if request.text is not None:
        return [sample_of_text(tokenizer, request.text)]
    if request.messages is not None:
        *before, last = _turns(request.messages)
        if not before or last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise PoiseError("messages must end in text by the assistant, after at least one other turn")
        try:
            check_answer(last, "messages")
        except ValueError as error:
            raise PoiseError(str(error)) from None
        return [generated(before, last["content"])]
    prompt = _prompt(request.prompt)
    completions = request.completions if request.completions is not None else [request.completion or ""]
    return [generated(prompt, completion) for completion in completions]


def _prompt(given: str | list[Turn] | None) -> Prompt:
    if isinstance(given, str):
        return given
    if not given:
        raise PoiseError("a prompt needs at least one turn")
    return _turns(given)


def _turns(turns: list[Turn]) -> list[dict[str, Any]]:
    if not turns:
        raise PoiseError("there are no turns")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: Turn, number: int) -> dict[str, Any]:
    found = turn.model_dump(exclude_unset=True) | {"role": usual_role(turn.role)}
    if isinstance(turn.content, list):
        try:
            found["content"] = text_of_parts(turn.content, "messages", number)
        except ValueError as error:
            raise PoiseError(str(error)) from None
    return found


# ---- other projects' ----


def _of_queries(request: OpenRLHFRequest, tokenizer: HfTokenizer) -> list[Sample]:
    if len(request.query) != len(request.prompts):
        raise PoiseError("query and prompts must be of one length")
    return [sample_of_query(tokenizer, *pair) for pair in zip(request.prompts, request.query, strict=True)]


def _to_openrlhf(rows: list[Json]) -> Json:
    """It takes scalars only in extra_logs: means, should there be several queries."""
    rewards = [row["reward"] for row in rows]
    logs = [_without_reward(row) for row in rows]
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {name: fmean(log[name] for log in logs) for name in logs[0]},
    }


def _of_slime(request: SlimeRequest, tokenizer: HfTokenizer) -> list[Sample]:
    return [sample_of_answer(tokenizer, _prompt(request.prompt), request.response)]


def _to_slime(rows: list[Json]) -> Json:
    return scalars(rows[0])


def _without_reward(row: Json) -> Json:
    return {name: value for name, value in scalars(row).items() if name != "reward"}


FORMS = {
    "/score": Form(
        ScoreRequest, _asked, lambda rows: {"scores": rows}, "Every head, their uncertainties and the reward"
    ),
    "/get_reward": Form(OpenRLHFRequest, _of_queries, _to_openrlhf, "OpenRLHF's remote reward model"),
    "/remote_rm": Form(SlimeRequest, _of_slime, _to_slime, "slime's remote_rm; train with --reward-key reward"),
}


def openapi(version: str) -> Json:
    """The OpenAPI document of all endpoints."""
    schemas: Json = {}
    paths: Json = {}
    error = {"description": "One line, in `error`", "content": {"application/json": {"schema": {"type": "object"}}}}
    answers = {str(status): error for status in (400, 401, 408, 413, 415, 422, 429, 500, 503)}
    for path, form in FORMS.items():
        schema = form.request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {form.request.__name__: schema}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form.request.__name__}"}}}
        good = {"description": "Scored", "content": {"application/json": {"schema": {"type": "object"}}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": form.summary, "requestBody": body, "responses": {"200": good, **answers}}}
    for path, summary in (
        ("/healthz", "The process answers"),
        ("/readyz", "Requests would be answered now"),
        ("/metrics", "Prometheus metrics"),
        ("/openapi.json", "This document"),
    ):
        denied = {code: answers[code] for code in ("401", "503")}
        paths[path] = {"get": {"summary": summary, "responses": {"200": {"description": "Fine"}, **denied}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Poise reward server", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}, {}],
    }
