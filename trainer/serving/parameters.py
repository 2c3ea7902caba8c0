"""What a request may ask for: its JSON becomes prompts and a Sampling each.

What this server cannot do is refused by name, unless its value means nothing (`presence_penalty: 0`); so is what the
API does not know. Beyond OpenAI's API: top_k, min_p, repetition_penalty, as vLLM names them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.inference.sampling import Sampling
from trainer.serving.refusal import Refusal, far_too_long, invalid, no_such_model, too_long

MOST_TEXTS = 128  # of a request: prompts times n
MOST_STOPS = 16
STOP_CHARACTERS = 200  # each token is compared with all beginnings of all stop strings
COMPLETION_TOKENS = 16  # the API's default

# Not here, and the values that do not ask for it.
ABSENT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    return text


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Str = Annotated[str, AfterValidator(_utf8)]
Stop = Annotated[Str, Field(min_length=1, max_length=STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS), BeforeValidator(_several)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(Body):
    """What both kinds of request have. null means the default."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Count | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Str | None = None  # a name for abuse reports, which changes no answer
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Common):
    prompt: Any
    best_of: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: Str | None = None


class Chat(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Request = TypeVar("Request", Completion, Chat)


def read(kind: type[Request], data: bytes) -> Request:
    """
    Raises:
        Refusal: the body is no JSON object, or a parameter is wrong, unknown or not possible here.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body of the request is not valid JSON.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "The body of the request is not a JSON object.")
    for name in ABSENT.keys() & value.keys():
        if (given := value.pop(name)) is not None and not any(_same(given, each) for each in ABSENT[name]):
            raise Refusal(400, f"This server has no {name}; leave it out.", param=name, code="unsupported_parameter")
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options is only for streams; set stream: true.")
    return request


def _same(given: Any, neutral: Any) -> bool:
    return given == neutral and isinstance(given, bool) == isinstance(neutral, bool)


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False)[0]
    words = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in words).removeprefix(".")
    if first["type"] == "missing":
        return Refusal(400, f"Missing required parameter: {param!r}.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"Unknown parameter: {param!r}.", param=param, code="unknown_parameter")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return Refusal(400, f"Invalid {param!r}: {first['msg']}.", param=param, code=code)


class Reader:
    """Makes what an engine takes from requests.

    Args:
        vocabulary: ids of the model.
        length: tokens of the longest text.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, asking: Asking | DataError, vocabulary: int, length: int):
        self.model, self.tokenizer, self._asking = model, tokenizer, asking
        self._vocabulary, self._length = vocabulary, length

    def completion(self, request: Completion) -> list[tuple[list[int], Sampling]]:
        """The texts of a request, n for each prompt. Raises Refusal."""
        self._is_ours(request)
        n = request.n or 1
        if request.best_of not in (None, n):
            raise Refusal(
                400, "This server has no best_of; leave it out.", param="best_of", code="unsupported_parameter"
            )
        if isinstance(request.prompt, list) and request.prompt and not isinstance(request.prompt[0], int):
            _refuse_many(len(request.prompt) * n)  # before all are tokenised
        prompts = self._prompts(request.prompt)
        wanted = request.max_tokens or COMPLETION_TOKENS
        sampling = _sampling(request, {self.tokenizer.eod_id}, request.logprobs)
        return self._texts("prompt", prompts, n, sampling, lambda prompt: wanted)

    def chat(self, request: Chat) -> list[tuple[list[int], Sampling]]:
        """The answers of a request. Raises Refusal."""
        self._is_ours(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true.")
        if isinstance(self._asking, DataError):
            raise Refusal(400, f"This model cannot chat: {self._asking}", param="messages", code="no_chat_template")
        given = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(given) > 1:
            raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
        messages = [_message(message, at) for at, message in enumerate(request.messages)]
        self._may_fit("".join(message["content"] for message in messages), "messages")
        try:
            prompt = self._asking.ids(messages, whole=True)
        except DataError as error:
            raise invalid("messages", f"{str(error).partition(';')[0]}.") from None
        wanted = next(iter(given), None)
        sampling = _sampling(request, self._asking.stops, (request.top_logprobs or 0) if request.logprobs else None)
        rest = max(1, self._length - len(prompt))
        return self._texts("messages", [prompt], request.n or 1, sampling, lambda _: wanted or rest)

    def _is_ours(self, request: Common) -> None:
        if request.model != self.model:
            raise no_such_model(request.model)

    def _texts(
        self, param: str, prompts: list[list[int]], n: int, sampling: Sampling, wanted: Callable[[list[int]], int]
    ) -> list[tuple[list[int], Sampling]]:
        _refuse_many(len(prompts) * n)
        for prompt in prompts:
            if len(prompt) + wanted(prompt) > self._length:
                raise too_long(param, self._length, len(prompt), wanted(prompt))
        each = [prompt for prompt in prompts for _ in range(n)]
        return [
            (prompt, replace(sampling, max_tokens=wanted(prompt), seed=(sampling.seed + i) % 2**63))
            for i, prompt in enumerate(each)
        ]

    def _prompts(self, value: Any) -> list[list[int]]:
        match value:
            case str():
                return [self._encoded(value, "prompt")]
            case [int(), *_] if not isinstance(value[0], bool):
                return [self._ids(value, "prompt")]
            case [str(), *_]:
                return [self._encoded(each, f"prompt[{i}]") for i, each in enumerate(value)]
            case [list(), *_]:
                return [self._ids(each, f"prompt[{i}]") for i, each in enumerate(value)]
        raise Refusal(
            400,
            "Invalid 'prompt': give a text, a list of texts, a list of token ids, or a list of such lists; none empty.",
            param="prompt",
            code="invalid_type",
        )

    def _encoded(self, text: Any, param: str) -> list[int]:
        if not isinstance(text, str) or not text:
            raise invalid(param, f"Invalid {param!r}: give a text of at least one character.")
        try:
            _utf8(text)
        except ValueError as error:
            raise invalid(param, f"Invalid {param!r}: {error}.") from None
        self._may_fit(text, param)
        return self.tokenizer.begun(self.tokenizer.encode_batch([text])[0])  # lets other threads run, unlike encode

    def _may_fit(self, text: str, param: str) -> None:
        """Refuse a text that is too long whatever its tokens are: to find them could hold up all others for seconds."""
        if len(text.encode()) > self._length * self._longest_token:
            raise far_too_long(param, self._length)

    @cached_property
    def _longest_token(self) -> int:
        """Its bytes."""
        return max(self.tokenizer.byte_lengths())

    def _ids(self, ids: Any, param: str) -> list[int]:
        known = range(self._vocabulary)
        if not isinstance(ids, list) or not ids or not all(type(each) is int and each in known for each in ids):
            raise invalid(
                param, f"Invalid {param!r}: give at least one token id, each from 0 to {self._vocabulary - 1}."
            )
        return ids


def _refuse_many(texts: int) -> None:
    if texts > MOST_TEXTS:
        raise invalid("n", f"{texts} texts are too many for one request; at most {MOST_TEXTS}.")


def _message(message: Message, at: int) -> dict[str, str]:
    if message.name is not None:
        raise Refusal(
            400, "This server has no names of speakers; leave it out.", param=f"messages[{at}].name",
            code="unsupported_parameter",
        )  # fmt: skip
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(message.content, f"messages[{at}].content")}


def _content(value: Any, param: str) -> str:
    """A text, or a list of parts that are texts."""
    parts: Sequence[Any] = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    for part in parts:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                try:
                    _utf8(text)
                except ValueError as error:
                    raise invalid(param, f"Invalid {param!r}: {error}.") from None
            case _:
                raise Refusal(400, f"Invalid {param!r}: only text is possible here.", param=param, code="invalid_type")
    return "".join(part["text"] for part in parts)


def _sampling(request: Common, stops: set[int], logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        seed=secrets.randbits(62) if request.seed is None else request.seed % 2**63,
        stop=tuple(request.stop or ()),
        stop_ids=frozenset(stops),
        logprobs=logprobs,
    )
