"""The OpenAI-compatible endpoint: requests -> jobs of a batch -> answers, whole or as they grow.

    POST /v1/chat/completions  POST /v1/completions  GET /v1/models  GET /health

Errors are OpenAI's: {"error": {"message", "type", "param", "code"}} and an HTTP status.
"""

import asyncio
import hmac
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from queue import Full
from typing import Any, TypeVar
from uuid import uuid4

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from minimind.common.language import say
from minimind.serving.batching import Job, Stopped
from minimind.serving.models import Served
from minimind.serving.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    parse,
)
from minimind.serving.texts import ReplyStream, TextStream

LARGEST = 2**20  # bytes of a request's body
BODY_SECONDS = 60  # for a client to send it
MOST_WAITING = 256  # texts that wait for room in the batch, and bodies that wait to be read
BUSY = "the server has too much to do. Try again later."
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
TYPES |= {500: "server_error", 503: "server_error"}
KINDS = {"chat": ("chat.completion", "chatcmpl-"), "text": ("text_completion", "cmpl-")}
T = TypeVar("T")


class RequestedTexts:
    """The texts of one request while they are written: its prompts `n` times each."""

    def __init__(
        self, served: Served, prompts: Sequence[list[int]], request: GenerationRequest, limit: int
    ):
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, str, str | None] | Exception] = asyncio.Queue()
        self.prompt_tokens = sum(map(len, prompts))
        self.texts: list[TextStream] = []
        self.jobs: list[Job] = []
        settings = served.model.generation_config
        chosen = {
            name: next(each for each in (given, kept, 1.0) if each is not None)
            for name in ("temperature", "top_p")
            for given, kept in [(getattr(request, name), getattr(settings, name, None))]
        }
        rows = [ids for ids in prompts for _ in range(request.n or 1)]
        if not served.batcher.is_alive():
            raise RequestError(503, "the model works no more; the server's log says why.")
        if len(rows) > MOST_WAITING:
            raise RequestError(
                400, f"prompt: found {len(rows):,}, expected {MOST_WAITING:,} or fewer."
            )
        for index, ids in enumerate(rows):
            room = min(limit, served.positions - len(ids))
            text = TextStream(served.decoder, served.ends, request.stops, room)
            seed = None if request.seed is None else f"{request.seed} {index}"
            self.texts.append(text)
            self.jobs.append(
                Job(
                    ids,
                    room,
                    **chosen,
                    take=lambda token, place=(index, text): self._take(*place, token),
                    fail=self._put,
                    draws=random.Random(seed),
                )
            )
        try:
            served.batcher.submit(self.jobs, MOST_WAITING)
        except Full:
            raise RequestError(429, BUSY) from None

    def _take(self, index: int, text: TextStream, token: int) -> bool:
        """Called by the batch's thread with each token of a text."""
        piece = text.take(token)
        if piece or text.finish:
            self._put((index, piece, text.finish))
        return text.finish is None

    def _put(self, item: tuple[int, str, str | None] | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the server has ended
            self.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """The number of a text, its next piece, and where it ends the reason; raises
        RequestError."""
        going = len(self.jobs)
        while going:
            item = await self.queue.get()
            if isinstance(item, Stopped):
                raise RequestError(503, "the server is being stopped.")
            if isinstance(item, Exception):
                raise RequestError(500, "the model failed; the server's log says why.")
            going -= item[2] is not None
            yield item

    def cancel(self) -> None:
        """Write no more."""
        for job in self.jobs:
            job.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's count of tokens."""
        written = sum(text.tokens for text in self.texts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }


class Answer:
    """What a request is answered with: as one object, or as the events of a stream."""

    def __init__(self, writing: RequestedTexts, request: GenerationRequest):
        self.writing, self.is_chat = writing, isinstance(request, ChatRequest)
        self.request = request
        kind, prefix = KINDS["chat" if self.is_chat else "text"]
        self.kind = kind
        self.common = {
            "id": prefix + uuid4().hex[:24],
            "created": int(time.time()),
            "model": request.model,
        }
        has_tools = self.is_chat and bool(request.tools) and request.tool_choice != "none"
        self.replies = [ReplyStream(has_tools) for _ in writing.texts]

    async def deltas(self) -> AsyncIterator[tuple[int, dict[str, Any], str | None]]:
        """The number of a choice, its next delta (of a text: its "text"), and where it ends the
        reason."""
        async for index, piece, finish in self.writing.pieces():
            if not self.is_chat:
                yield index, {"text": piece}, finish
                continue
            delta = self.replies[index].take(piece, finish is not None)
            if "tool_calls" in delta:
                finish = "tool_calls"
            if delta or finish:
                yield index, delta, finish

    async def whole(self) -> dict[str, Any]:
        """One object with all choices."""
        choices: list[dict[str, Any]] = [{} for _ in self.writing.texts]
        async for index, delta, finish in self.deltas():
            choice = choices[index]
            for name, value in delta.items():
                choice[name] = choice.get(name, type(value)()) + value
            if finish:
                choice["finish_reason"] = finish
        for index, choice in enumerate(choices):
            finish = choice.pop("finish_reason")
            if self.is_chat:
                for call in choice.get("tool_calls", ()):
                    del call["index"]
                content = {"content": None if "tool_calls" in choice else ""}
                choice = {"message": {"role": "assistant", **content, **choice}}
            choices[index] = {"index": index, **choice, "logprobs": None, "finish_reason": finish}
        return {**self.common, "object": self.kind, "choices": choices, "usage": self.writing.usage}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, as OpenAI's clients read them."""
        common = {**self.common, "object": self.kind + ".chunk" * self.is_chat}

        def event(choices: list[dict], **fields: Any) -> str:
            content = {**common, "choices": choices, **fields}
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        def choice(index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
            content = {"delta": delta} if self.is_chat else delta
            return {"index": index, **content, "logprobs": None, "finish_reason": finish}

        options = self.request.stream_options
        try:
            if self.is_chat:
                opening = {"role": "assistant", "content": ""}
                for index in range(len(self.replies)):
                    yield event([choice(index, opening, None)])
            async for index, delta, finish in self.deltas():
                yield event([choice(index, delta, finish)])
            if options and options.include_usage:
                yield event([], usage=self.writing.usage)
            yield "data: [DONE]\n\n"
        except RequestError as problem:
            yield f"data: {json.dumps(error_body(problem))}\n\n"


class EventStream(StreamingResponse):
    """A streamed answer; where the client is gone, its texts are not written further."""

    def __init__(self, answer: Answer, headers: dict[str, str]):
        headers = {**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(), headers=headers, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        """Called by the server."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.writing.cancel()


async def whole_or_gone(http: HttpRequest, answer: Answer, headers: dict[str, str]) -> Response:
    """The whole answer; where the client is gone before it, its texts are not written further."""
    working = asyncio.ensure_future(answer.whole())
    leaving = asyncio.ensure_future(http.receive())  # the body is read: the next is a disconnect
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return JSONResponse(working.result(), headers=headers)
    finally:
        working.cancel()
        leaving.cancel()
        answer.writing.cancel()


def is_from_other_site(http: HttpRequest) -> bool:
    """Whether a page of another site made a browser send a request; decided as Go's
    net/http.CrossOriginProtection does, except: pages of an app, such as app://chat, are none."""
    site, origin = http.headers.get("sec-fetch-site"), http.headers.get("origin")
    if origin and not origin.startswith(("http://", "https://", "null")):
        return False
    if site:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != http.headers.get("host")


async def read_body(http: HttpRequest) -> bytes:
    """The body of a request; raises RequestError where it is too large or slow, no JSON, or sent
    by a page of another site."""
    if is_from_other_site(http):
        raise RequestError(403, "a page of another site sent this request.")
    if http.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        # What a browser sends to another site without asking it first is of another type
        raise RequestError(415, "expected the header Content-Type: application/json.")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                size += len(chunk)
                if size <= LARGEST:
                    body += chunk
                elif size > 16 * LARGEST:  # up to that it is read: the client then reads the answer
                    break
    except TimeoutError:
        raise RequestError(408, f"the body took more than {BODY_SECONDS:,} seconds.") from None
    if size > LARGEST:
        raise RequestError(413, f"the body has more than {LARGEST:,} bytes.")
    return bytes(body)


def error_body(problem: RequestError) -> dict[str, Any]:
    """OpenAI's object for an error."""
    kind = TYPES.get(problem.status, "invalid_request_error")
    words = {"message": str(problem), "type": kind, "param": problem.param, "code": problem.code}
    return {"error": words}


def error_response(problem: RequestError) -> JSONResponse:
    """An error as a response."""
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else None
    return JSONResponse(error_body(problem), problem.status, headers)


class RequireKey:
    """Refuses requests below /v1 without the key."""

    def __init__(self, app, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope, receive, send) -> None:
        """Called by the server."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, b"Bearer " + self.key):
                problem = RequestError(
                    401, "expected the server's API key.", code="invalid_api_key"
                )
                await error_response(problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Endpoint:
    """The routes for some models.

    Args:
        max_new_tokens: limit of a text whose request has none.
    """

    def __init__(self, models: Iterable[Served], max_new_tokens: int):
        self.models = {served.name: served for served in models}
        self.max_new_tokens = max_new_tokens
        self.began = int(time.time())
        self.reader = CapacityLimiter(1)

    async def in_thread(self, read: Callable[[bytes], T], body: bytes) -> T:
        """Call `read` in a thread: a large body takes seconds to tokenise, in which the loop goes
        on serving other clients. One at a time, because tokenizers are not safe in threads.

        Raises:
            RequestError: too many wait for it.
        """
        if self.reader.statistics().tasks_waiting >= MOST_WAITING:
            raise RequestError(429, BUSY)
        return await to_thread.run_sync(read, body, limiter=self.reader)

    def find(self, name: str) -> Served:
        """The model with a name; raises RequestError."""
        if name not in self.models:
            names = ", ".join(self.models)
            raise RequestError(
                404, f"no such model: {name[:200]!r}. There is {names}.", "model", "model_not_found"
            )
        return self.models[name]

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""

        def read(body: bytes) -> tuple[ChatRequest, Served, list[int], int, int]:
            request: ChatRequest = parse(ChatRequest, body)
            served = self.find(request.model)
            limit = request.max_completion_tokens or request.max_tokens or self.max_new_tokens
            return request, served, *served.chat_prompt(request.conversation, limit), limit

        request, served, ids, left_out, limit = await self.in_thread(read, await read_body(http))
        headers = {}
        if left_out:
            headers["X-Messages-Left-Out"] = str(left_out)
            say(
                f"notice: a conversation is longer than the {served.positions:,} tokens of"
                f" {served.name}: its first {left_out:,} messages are left out.",
                file=sys.stderr,
            )
        return await self.answer(
            http, request, RequestedTexts(served, [ids], request, limit), headers
        )

    async def complete(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""

        def read(body: bytes) -> tuple[CompletionRequest, Served, list[list[int]]]:
            request: CompletionRequest = parse(CompletionRequest, body)
            served = self.find(request.model)
            return request, served, served.text_prompts(request.prompts)

        request, served, prompts = await self.in_thread(read, await read_body(http))
        limit = request.max_tokens or self.max_new_tokens
        return await self.answer(http, request, RequestedTexts(served, prompts, request, limit), {})

    async def answer(
        self,
        http: HttpRequest,
        request: GenerationRequest,
        writing: RequestedTexts,
        headers: dict[str, str],
    ) -> Response:
        """The response to a request whose texts are being written."""
        answer = Answer(writing, request)
        if request.stream:
            return EventStream(answer, headers)
        return await whole_or_gone(http, answer, headers)

    def describe(self, served: Served) -> dict[str, Any]:
        """OpenAI's object for a model, and what the page needs to know."""
        own = {"is_base": served.is_base, "max_model_len": served.positions}
        return {
            "id": served.name,
            "object": "model",
            "created": self.began,
            "owned_by": "minimind",
            **own,
        }

    async def list_models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        data = [self.describe(served) for served in self.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        return JSONResponse(self.describe(self.find(http.path_params["name"])))

    async def health(self, http: HttpRequest) -> Response:
        """GET /health."""
        is_well = all(served.batcher.is_alive() for served in self.models.values())
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    def routes(self) -> list[BaseRoute]:
        """The routes of the endpoint."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/health", self.health),
        ]

    def stop(self) -> None:
        """End the batches."""
        for served in self.models.values():
            served.batcher.stop()


def build_app(
    endpoint: Endpoint,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
    routes: Iterable[BaseRoute] = (),
) -> Starlette:
    """The application.

    Args:
        key: what requests have to send as a bearer token.
        hosts: names by which the server may be addressed; see `host_names`.
        routes: more of them.
    """

    async def refuse(http: HttpRequest, problem: Exception) -> Response:
        return error_response(problem)  # type: ignore[arg-type]

    async def refuse_http(http: HttpRequest, problem: Exception) -> Response:
        path = f"{http.method} {http.url.path[:200]}"
        return error_response(RequestError(problem.status_code, f"{path}: {problem.detail}."))  # type: ignore[attr-defined]

    async def forget(http: HttpRequest, problem: Exception) -> Response:
        return Response(status_code=499)  # nginx's status for a client that is gone

    async def fail(http: HttpRequest, problem: Exception) -> Response:
        return error_response(RequestError(500, "the server failed; its log says why."))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        endpoint.stop()

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    middleware += [Middleware(RequireKey, key=key)] if key else []
    app = Starlette(
        routes=[*endpoint.routes(), *routes],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            RequestError: refuse,
            HTTPException: refuse_http,
            ClientDisconnect: forget,
            Exception: fail,
        },
    )
    app.state.stop = endpoint.stop
    return app
