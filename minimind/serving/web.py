"""The chat page, and the votes on it: preference pairs that train_dpo.py reads."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minimind.common.errors import BadRowError
from minimind.common.files import append_json, json_lines
from minimind.common.page import script_policy
from minimind.data.conversations import Conversation
from minimind.data.message_order import check_order
from minimind.data.messages import Message, parse_messages
from minimind.data.prompts import REPLY
from minimind.pairs.making import PairReply, is_usable, pair_row
from minimind.serving.app import read_body
from minimind.serving.requests import RequestError, parse

PAGE = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
HEADERS = {
    "Content-Security-Policy": script_policy(PAGE) + "; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class VotedReply(BaseModel):
    """One of the two replies."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    message: dict[str, Any]
    finished: bool  # whether it ended by itself


class Vote(BaseModel):
    """The body of /v1/votes."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompt: Annotated[list[dict[str, Any]], Field(min_length=1)]
    left: VotedReply
    right: VotedReply
    choice: Literal["left", "right", "tie", "both_bad"]


class Votes:
    """The votes on replies of two models: each is appended to the file `pairs` as a row for
    train_dpo.py, if one of the replies is better, and to `pairs`.votes in any case.

    A better reply that did not end by itself makes no pair: it would be trained to end in the
    middle. Nor do replies that are equal, or that training refuses.
    """

    def __init__(self, pairs: Path):
        self.pairs, self.record = pairs, pairs.with_name(f"{pairs.name}.votes")
        self.count = sum(1 for _ in json_lines(pairs))
        self.choices: Counter[str] = Counter()  # since the start: a model's name, tie or both_bad

    def keep(self, vote: Vote) -> bool:
        """Append a vote; whether it makes a pair. Raises BadRowError, OSError."""
        prompt = parse_messages(vote.prompt, "prompt")
        check_order([*prompt, REPLY], "prompt")
        replies = {side: reply_of(getattr(vote, side), side) for side in ("left", "right")}
        other = {"left": "right", "right": "left"}.get(vote.choice)
        is_pair = (
            other is not None
            and replies[vote.choice].stopped
            and all(is_usable(Conversation(prompt), reply) for reply in replies.values())
            and replies["left"].message != replies["right"].message
        )
        if is_pair:
            row = pair_row(Conversation(prompt), replies[vote.choice], replies[other])
            append_json(self.pairs, row)
            self.count += 1
        append_json(self.record, vote.model_dump())
        self.choices[getattr(vote, vote.choice).model if other else vote.choice] += 1
        return is_pair

    async def post(self, http: HttpRequest) -> Response:
        """POST /v1/votes."""
        vote: Vote = parse(Vote, await read_body(http))
        try:
            is_pair = self.keep(vote)
        except BadRowError as problem:
            raise RequestError(400, f"{problem}.") from problem
        except OSError as error:
            raise RequestError(500, f"{self.pairs}: {error.strerror}.") from error
        return JSONResponse({"is_pair": is_pair, "pairs": self.count})


def reply_of(reply: VotedReply, name: str) -> PairReply:
    """A reply of the page; raises BadRowError."""
    message: Message
    message, *more = parse_messages([reply.message], name)
    if more or message["role"] != "assistant":
        raise BadRowError(f"{name}: found another role, expected one message of the assistant")
    return PairReply(message["content"], message, reply.finished)


async def show_page(http: HttpRequest) -> Response:
    """GET /."""
    return Response(PAGE, media_type="text/html", headers=HEADERS)


def routes(votes: Votes | None) -> list[Route]:
    """The page, and with two models their votes."""
    routes = [Route("/", show_page)]
    return routes + ([Route("/v1/votes", votes.post, methods=["POST"])] if votes else [])
