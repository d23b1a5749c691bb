"""The bodies of requests, as the OpenAI API has them: every field is used, or has a value that
changes nothing, or is an error."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minimind.common.errors import BadRowError
from minimind.data.calls import find_tools
from minimind.data.conversations import Conversation, without_empty_system
from minimind.data.message_order import check_order
from minimind.data.messages import parse_messages
from minimind.data.prompts import REPLY

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Not supported: the values that change nothing
NEUTRAL: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
# Notes for the server's owner, and switches of what this server does anyway
UNUSED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
UNUSED |= {"service_tier", "store", "user"}


class RequestError(Exception):
    """A request that is refused, as OpenAI's errors are: HTTP status, field, and code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, body: Any) -> Any:
        """The body without fields that change nothing; raises RequestError for one that would."""
        if not isinstance(body, dict):
            return body
        for name, values in NEUTRAL.items():
            value = body.get(name)
            if value is not None and not any(
                value == each and type(value) in (type(each), float) for each in values
            ):
                raise RequestError(400, f"{name}: this server does not support it.", name)
        return {
            name: value
            for name, value in body.items()
            if name not in UNUSED and (name not in NEUTRAL or name == "tool_choice")
        }

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several texts, or lists of ids."""
        is_one = isinstance(self.prompt, str) or (
            bool(self.prompt) and isinstance(self.prompt[0], int)
        )
        return [self.prompt] if is_one else self.prompt  # type: ignore[return-value]


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None

    @property
    def conversation(self) -> Conversation:
        """The messages and tools, checked; raises RequestError."""
        try:
            messages = parse_messages(self.messages, "messages")
            check_order([*messages, REPLY])
            given = None if self.tool_choice == "none" else self.tools
            tools = find_tools([("tools", given)], [])
            return Conversation(without_empty_system(messages, tools), tools)
        except BadRowError as problem:
            raise RequestError(400, f"{problem}.", "messages") from problem


def parse(kind: type[GenerationRequest], body: bytes) -> Any:
    """A request from the JSON of its body; raises RequestError."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = next((str(name)[:100] for name in problem["loc"]), None)
    where = f"{param}: " if param else ""
    raise RequestError(400, f"{where}{problem['msg']}.", param)
