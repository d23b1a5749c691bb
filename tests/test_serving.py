"""`minimind serve`: its batch, its texts, and the endpoint as OpenAI's client and others see it."""

import asyncio
import copy
import json
import os
import random
import signal
import socket
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue

import httpx
import numpy as np
import openai
import pytest
import torch
from judged import write_scorer, write_talker
from pipeline import PATIENCE, failure, run_cli, user, wait_until
from serving import serving

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.data.chat_encoder import encode_prompts
from minimind.data.messages import reply_message
from minimind.generation import load_for_generation
from minimind.serving import app as serving_app
from minimind.serving import models as serving_models
from minimind.serving import server as serving_server
from minimind.serving.app import Endpoint, build_app
from minimind.serving.batching import Batcher, Job, choose, nucleus
from minimind.serving.models import Served, names_of
from minimind.serving.server import host_names
from minimind.serving.texts import ReplyStream, TextStream

KEY = "a-secret-of-this-test"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory):
    """A chat model, a base model, and a reward model."""
    root = tmp_path_factory.mktemp("served")
    config = MiniMindConfig(vocab_size=len(tokenizer), **SMALL)
    chat = write_talker(root / "chat", config, tokenizer, ends=2)
    base = write_talker(root / "base", config, tokenizer, seed=1, ends=2)
    (root / "base" / "stage.json").write_text(json.dumps({"stage": "pretrain"}))
    return chat, base, write_scorer(root / "reward", config, tokenizer)


@pytest.fixture(scope="module")
def endpoint(directories, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(tmp_path_factory.mktemp("cache")))
        models = [
            Served(each, name, 8) for each, name in zip(directories, ("chat", "base"), strict=False)
        ]
    endpoint = Endpoint(models, 12)
    yield endpoint
    endpoint.stop()


@pytest.fixture(scope="module")
def address(endpoint):
    with serving(build_app(endpoint, hosts=["127.0.0.1"])) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address, path="/v1/chat/completions", **options):
    """The status and the error of a request."""
    answer = httpx.post(address + path, timeout=PATIENCE, **options)
    return answer.status_code, answer.json()["error"]


# The batch


@pytest.fixture
def sensitive(config):
    """A model whose next token depends on all tokens before it, and on where they stand."""
    config.initializer_range = 0.3
    torch.manual_seed(0)
    return MiniMindForCausalLM(config).eval()


def written(batcher, *jobs):
    """The tokens of jobs (ids, limit, options) that are submitted at once."""
    outputs, done, submitted = [[] for _ in jobs], Queue(), []
    for output, (ids, limit, options) in zip(outputs, jobs, strict=True):

        def take(token, output=output, limit=limit):
            output.append(token)
            if len(output) == limit:
                done.put(None)
            return True

        settings = {"temperature": 0, "top_p": 1.0, "fail": done.put} | options
        submitted.append(Job(ids, limit, take=take, **settings))
    batcher.submit(submitted)
    for _ in jobs:
        problem = done.get(timeout=PATIENCE)
        assert problem is None, problem
    return outputs


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_texts_that_join_and_leave_a_batch_are_those_of_generate(sensitive, penalty):
    """Three at a time: the first three begin together, and the others where one ends."""
    model = sensitive
    model.generation_config.repetition_penalty = penalty
    prompts = [[5, 6, 7], [9] * 40, [11], [30, 31, 32, 33, 34], [50] * 17, [200, 201]]
    limits = [30, 3, 12, 20, 7, 1]
    prompts, limits = [*prompts, [8] * 9, [77]], [*limits, 5, 90]
    expected = [
        model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=limit,
            eos_token_id=-1,
        )[0, len(ids) :].tolist()
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    batcher = Batcher(model, most=3)
    batcher.start()
    jobs = [(ids, limit, {}) for ids, limit in zip(prompts, limits, strict=True)]
    assert written(batcher, *jobs) == expected
    batcher.stop()


def test_a_seed_gives_the_same_text_alone_and_among_others(sensitive):
    batcher = Batcher(sensitive, most=4)
    batcher.start()

    def job(seed):
        return [5, 6, 7], 20, {"temperature": 1.0, "draws": random.Random(seed)}

    (alone,) = written(batcher, job(1))
    among = written(batcher, ([9] * 30, 5, {"temperature": 2.0}), job(1), job(2))
    batcher.stop()
    assert alone == among[1] != among[2]


def test_sampling_follows_the_distribution_within_the_nucleus():
    """Numbers drawn evenly from [0, 1) hit each token by its share of the nucleus."""
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = [(index + 0.5) / 90 for index in range(90)]

    class Drawn:
        def __init__(self, number):
            self.random = lambda: number

    def counts(temperature, top_p):
        logits = (shares.log() * temperature).expand(90, 4)
        jobs = [Job([], 1, temperature, top_p, None, None, Drawn(number)) for number in draws]
        return torch.bincount(torch.tensor(choose(logits, jobs)), minlength=4).tolist()

    assert counts(1.0, 1.0) == counts(0.5, 1.0) == [9, 36, 18, 27]
    assert counts(1.0, 0.8) == [0, 40, 20, 30]  # 0.4 + 0.3 is below it
    assert counts(1.0, 0.0) == [0, 90, 0, 0]  # one token is always left
    # Among many tokens, a nucleus larger than what is sorted first
    even = Job([], 1, 1.0, 0.5, None, None, Drawn(0.999))
    assert choose(torch.zeros(1, 1000), [even])[0] < 1000
    assert [len(nucleus(np.ones(1000), top_p)) for top_p in (0.5, 0.1)] == [500, 100]
    mixed = [Job([], 1, temperature, 1.0, None, None, Drawn(0.99)) for temperature in (0, 1.0)]
    assert choose(shares.log().expand(2, 4), mixed) == [1, 3]


def test_an_error_ends_the_texts_of_its_batch_and_no_others(model, monkeypatch, capsys):
    batcher, failed = Batcher(model.eval(), most=4), Queue()
    forward, broken = type(model).forward, [True]

    def fail_once(self, *args, **options):
        if broken.pop() if broken else False:
            raise RuntimeError("no memory")
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", fail_once)
    batcher.submit([Job([5], 3, 0, 1.0, None, failed.put)])
    batcher.start()
    assert str(failed.get(timeout=PATIENCE)) == "no memory"
    assert len(written(batcher, ([5], 3, {}))[0]) == 3
    batcher.stop()
    assert capsys.readouterr().err == "error: RuntimeError: no memory\n"


# Texts


def streamed(tokenizer, text, stops=(), limit=1000, ends=()):
    stream = TextStream(tokenizer.backend_tokenizer, ends, stops, limit)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.take(token))
        if stream.finish:
            break
    return pieces, stream.finish


def test_a_text_ends_before_a_stop_string_that_spans_tokens(bytewise):
    assert streamed(bytewise, "one two three", ["two"])[0][:3] == ["o", "n", "e"]
    pieces, finish = streamed(bytewise, "one two three", ["two", "tw "])
    assert ("".join(pieces), finish) == ("one ", "stop")
    # What only begins like one is given as soon as that is certain, or at the end
    pieces, finish = streamed(bytewise, "one tw", ["two"], limit=6)
    assert ("".join(pieces), finish) == ("one tw", "length")
    assert streamed(bytewise, "ab", ["ac"])[0] == ["", "ab"]


def test_half_a_character_is_never_given(bytewise):
    pieces, finish = streamed(bytewise, "a狐", limit=3)
    assert (pieces, finish) == (["a", "", ""], "length")
    assert streamed(bytewise, "狐狸")[0] == ["", "", "狐", "", "", "狸"]


REPLIES = [
    "the fox",
    "<think>\n1 + 1\n</think>\n\n2",
    "<think>never closed",
    "<thinking> is a word",
    "a < b and <tool_call> is a tag",
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    '<think>\nhm\n</think>\n\nI add.\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
    "\n\n leading lines",
    " \n",
]


@pytest.mark.parametrize("text", REPLIES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_parts_of_a_reply_add_up_to_the_message_that_training_has(text, size):
    stream, whole = ReplyStream(has_tools=True), {"content": "", "reasoning_content": ""}
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for index, piece in enumerate(pieces):
        delta = stream.take(piece, index == len(pieces) - 1)
        calls = delta.pop("tool_calls", [])
        for name, value in delta.items():
            whole[name] += value
    expected = reply_message(text)
    if "never" in text:  # training refuses to guess; here it is reasoning
        expected = {"content": "", "reasoning_content": "never closed"}
    assert whole["content"].strip() == expected["content"].strip()
    assert whole["reasoning_content"] == expected.get("reasoning_content", "")
    called = [json.loads(call["function"]["arguments"]) for call in calls]
    assert called == [each["function"]["arguments"] for each in expected.get("tool_calls", [])]


# The endpoint


def test_a_chat_is_answered_as_a_whole_and_in_pieces(client):
    options = {"model": "chat", "messages": [user("who runs?")], "temperature": 0}
    whole = client.chat.completions.create(**options)
    (choice,) = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert whole.usage.completion_tokens == 12  # the server's limit
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**options, **more)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage
    assert last.choices == []


def test_seed_stop_and_number_of_choices_are_obeyed(client):
    def texts(**options):
        options = {"model": "chat", "messages": [user("hi")], "max_tokens": 20} | options
        answer = client.chat.completions.create(**options)
        return [choice.message.content for choice in answer.choices], answer

    first, answer = texts(seed=1, n=2)
    assert first == texts(seed=1, n=2)[0] != texts(seed=2, n=2)[0]
    assert first[0] != first[1]
    assert [choice.index for choice in answer.choices] == [0, 1]
    (text,), _ = texts(temperature=0)
    stop = text[5:7]
    (stopped,), answer = texts(temperature=0, stop=[stop, "\0"])
    assert stopped == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        model="chat", messages=[user("hi")], max_tokens=20, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stopped


def test_texts_are_completed_by_base_and_chat_models(client, endpoint):
    answer = client.completions.create(
        model="base", prompt=["the fox", "a dog"], n=2, max_tokens=8, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    first, second, third, _ = (choice.text for choice in answer.choices)
    assert first == second != third
    served = endpoint.models["base"]
    (ids,) = served.text_prompts(["the fox"])
    model, tokenizer = load_for_generation(str(served.path))
    new = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=8,
        do_sample=False,
        use_cache=True,
    )[0, len(ids) :]
    assert first == tokenizer.decode(new, skip_special_tokens=True)
    chunks = list(
        client.completions.create(
            model="base", prompt="the fox", max_tokens=8, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == first
    answer = client.completions.create(model="base", prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == first
    assert client.completions.create(model="chat", prompt="hi", max_tokens=1).choices


def test_models_and_health_are_told(client, address):
    assert [(model.id, model.is_base) for model in client.models.list()] == [
        ("chat", False),
        ("base", True),
    ]
    assert client.models.retrieve("chat").max_model_len == 1024
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_call_of_a_tool_is_an_answer(client, endpoint, monkeypatch):
    """Whatever the model writes, the text stands for a call."""
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    prompts, tokenizer = [], endpoint.models["chat"].tokenizer

    class Scripted(TextStream):
        def take(self, token):
            self.tokens, self.finish = self.tokens + 1, "stop"
            return call

    def chat_prompt(self, conversation, limit):
        prompts.append(tokenizer.decode(original(self, conversation, limit)[0]))
        return original(self, conversation, limit)

    original = Served.chat_prompt
    monkeypatch.setattr(Served, "chat_prompt", chat_prompt)
    monkeypatch.setattr(serving_app, "TextStream", Scripted)
    options = {"model": "chat", "messages": [user("1 + 1?")], "tools": [TOOL]}
    (choice,) = client.chat.completions.create(**options).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (made,) = choice.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("add", {"a": 1})
    *_, last = client.chat.completions.create(**options, stream=True)
    assert last.choices[0].delta.tool_calls[0].function.name == "add"
    assert last.choices[0].finish_reason == "tool_calls"
    # The result goes back, and the model reads it
    result = {"role": "tool", "tool_call_id": made.id, "content": "twenty-two"}
    options["messages"] += [choice.message.model_dump(exclude_none=True), result]
    client.chat.completions.create(**options)
    assert '"add"' in prompts[0]
    assert "twenty-two" in prompts[-1]
    (choice,) = client.chat.completions.create(**options, tool_choice="none").choices
    assert (choice.finish_reason, choice.message.content) == ("stop", call)


BODY = {"model": "chat", "messages": [user("hi")]}
BAD_BODIES = {
    "messages: Field required": {"model": "chat"},
    "model: Field required": {"messages": []},
    "messages: Input should be a valid": BODY | {"messages": "hi"},
    "messages: List should have at least 1": BODY | {"messages": []},
    "messages[0]: found the content 5": BODY | {"messages": [user(5)]},
    'messages[0]: found a part of type "image_url"': BODY
    | {"messages": [user([{"type": "image_url", "image_url": {"url": "http://x"}}])]},
    "messages[0]: found the role 'assistant'": BODY
    | {"messages": [{"role": "assistant", "content": "a"}]},
    "temperature: Input should be a valid number": BODY | {"temperature": "hot"},
    "temperature: Input should be less": BODY | {"temperature": 3},
    "max_tokens: Input should be a valid integer": BODY | {"max_tokens": True},
    "max_tokens: Input should be greater": BODY | {"max_tokens": 0},
    "n: Input should be less": BODY | {"n": 1000},
    "stop: Input should be": BODY | {"stop": [5]},
    "stop: String should have at least 1": BODY | {"stop": ""},
    "tools[0]": BODY | {"tools": [{"type": "function"}]},
    "tool_choice: this server does not support it": BODY | {"tool_choice": "required"},
    "logprobs: this server does not support it": BODY | {"logprobs": True},
    "response_format: this server": BODY | {"response_format": {"type": "json_object"}},
    "max_new_tokens: Extra inputs": BODY | {"max_new_tokens": 5},
    "base is a base model": BODY | {"model": "base"},
    "the prompt has": BODY | {"messages": [user("fox " * 1000)]},
    "temperature: Input should be a finite": b'{"model": "chat", "temperature": NaN}',
    "Invalid JSON: number out of range": b'{"model": "chat", "seed": 1' + b"0" * 5000 + b"}",
    "Invalid JSON: unexpected end of hex": b'{"model": "\\ud800"}',
    f"{'x' * 100}: Extra inputs": BODY | {"x" * 1000: 1},
    "Invalid JSON": b"{",
    "Invalid JSON: recursion": b"[" * 10_000,
    "Invalid JSON: expected value": b"\xff",
    "Input should be an object": b"[1]",
}


@pytest.mark.parametrize("message", BAD_BODIES)
def test_a_malformed_request_gets_its_reason(address, message):
    body = BAD_BODIES[message]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    status, error = post(address, content=content, headers=headers)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(message)


def test_other_refusals_have_their_status(address, client, endpoint, monkeypatch):
    with pytest.raises(openai.NotFoundError, match="no such model: 'other'"):
        client.chat.completions.create(**BODY | {"model": "other"})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for prompt in ("fox " * 1000, [], [[]], [10_000], ["a", 5]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="base", prompt=prompt)
    huge = BODY | {"messages": [user("x" * 2_000_000)]}
    assert post(address, json=huge)[0] == 413
    assert post(address, content=json.dumps(BODY))[0] == 415
    assert post(address, "/v1/other", json=BODY)[0] == 404
    for path in ("/../etc/passwd", "/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd"):
        assert httpx.get(address + path).status_code == 404
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    # The name of another site that leads to this machine
    assert httpx.get(f"{address}/v1/models", headers={"Host": "evil.org"}).status_code == 400
    # Values that change nothing are accepted
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "user": "me"}
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "auto", "n": None}
    assert client.chat.completions.create(**BODY, **neutral).choices
    monkeypatch.setattr(serving_app, "MOST_WAITING", 1)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**BODY, n=2)

    batcher = endpoint.models["chat"].batcher
    monkeypatch.setattr(batcher, "most", 0)  # it may not have begun to wait, and takes none
    monkeypatch.setattr(batcher, "waiting", deque([Job([5], 1, 0, 1.0, None, None)]))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**BODY)
    monkeypatch.setattr(batcher, "is_alive", lambda: False)
    assert post(address, json=BODY)[0] == 503
    assert httpx.get(f"{address}/health").status_code == 503


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"Sec-Fetch-Site": "cross-site", "Origin": "{address}"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 400),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "app://chat"}, 400),
        ({"Origin": "{address}"}, 400),
    ],
)
def test_a_page_of_another_site_cannot_use_the_server(address, headers, status):
    headers = {name: value.format(address=address) for name, value in headers.items()}
    assert post(address, json={}, headers=headers)[0] == status


def test_a_server_of_this_machine_has_its_own_names_only():
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert {*host_names(host)} == {host, "127.0.0.1", "localhost", "[::1]"}
    assert host_names("0.0.0.0") == ("*",)


def test_headers_without_end_are_refused(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100_000)
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_a_body_that_does_not_arrive_is_given_up(endpoint, monkeypatch):
    monkeypatch.setattr(serving_app, "BODY_SECONDS", 0.01)

    async def half():
        yield b"{"
        await asyncio.Event().wait()

    async def send():
        transport = httpx.ASGITransport(build_app(endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/completions", content=half(), headers=headers)

    assert asyncio.run(send()).status_code == 408


def test_a_prompt_is_tokenised_while_other_clients_get_their_tokens(
    address, client, endpoint, monkeypatch
):
    """The stream goes on after the prompt's reading has begun, and ends before it ends."""
    begun, streamed = threading.Event(), threading.Event()
    accept, chat_prompt = Job.accept, Served.chat_prompt

    def wait_for_prompt(job, token):
        assert len(job.written) < 2 or begun.wait(PATIENCE)
        return accept(job, token)

    def wait_for_stream(*args):
        begun.set()
        assert streamed.wait(PATIENCE)
        return chat_prompt(*args)

    monkeypatch.setattr(Job, "accept", wait_for_prompt)
    stream = client.completions.create(model="base", prompt="the fox", max_tokens=8, stream=True)
    next(stream)
    monkeypatch.setattr(Served, "chat_prompt", wait_for_stream)
    monkeypatch.setattr(serving_app, "MOST_WAITING", 1)

    def ask():
        return httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=PATIENCE).status_code

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask), pool.submit(ask)]
        list(stream)
        # One is read, one waits, and a third is refused
        wait_until(lambda: endpoint.reader.statistics().tasks_waiting == 1)
        assert ask() == 429
        monkeypatch.setattr(serving_app, "MOST_WAITING", 2)  # both may wait for the model
        streamed.set()
        assert [each.result() for each in asked] == [200, 200]


def test_clients_that_are_gone_leave_room_to_others(model):
    batcher = Batcher(model, most=1)
    job, other = (Job([5], 1, 0, 1.0, None, None) for _ in range(2))
    batcher.submit([job], most_waiting=1)
    with pytest.raises(Full):
        batcher.submit([other], most_waiting=1)
    job.cancel()
    batcher.submit([other], most_waiting=1)
    assert list(batcher.waiting) == [other]


def test_sixteen_clients_get_what_each_gets_alone(client):
    def ask(number, stream=False):
        options = {"model": "chat", "messages": [user(f"who runs {number}?")], "temperature": 0}
        options |= {"max_tokens": 4 + number}
        if not stream:
            return client.chat.completions.create(**options).choices[0].message.content
        chunks = client.chat.completions.create(**options, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16), [False, True] * 8)) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_ends_the_text(address, endpoint, monkeypatch, stream):
    jobs, submit = [], Batcher.submit
    monkeypatch.setattr(
        Batcher, "submit", lambda own, new, most: jobs.extend(new) or submit(own, new)
    )
    # A text that would go on for long
    monkeypatch.setattr(Job, "accept", lambda job, token: job.written.append(token) is None)
    body = json.dumps(BODY | {"stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: jobs and len(jobs[0].written) > 3)
        assert not jobs[0].is_cancelled
    wait_until(lambda: jobs[0].is_cancelled)
    count = len(jobs[0].written)
    assert httpx.get(f"{address}/health").status_code == 200
    wait_until(lambda: len(jobs[0].written) <= count + 2)


@pytest.mark.parametrize("count", [60, 600])
def test_a_conversation_that_is_too_long_loses_its_first_turns(address, endpoint, capsys, count):
    served = endpoint.models["chat"]
    turns = [
        message
        for number in range(count)
        for message in (
            user(f"{number} fox runs home"),
            {"role": "assistant", "content": "the dog"},
        )
    ]
    messages = [{"role": "system", "content": "be kind"}, *turns, user("who?")]
    answer = httpx.post(
        f"{address}/v1/chat/completions", json=BODY | {"messages": messages}, timeout=PATIENCE
    )
    left_out = int(answer.headers["X-Messages-Left-Out"])
    assert left_out % 2 == 0 < left_out < 2 * count
    room = served.positions - endpoint.max_new_tokens
    kept = [messages[0], *messages[1 + left_out :]]
    more = [messages[0], *messages[1 + left_out - 2 :]]
    ids, longer = encode_prompts([kept, more], served.encoder)
    assert answer.json()["usage"]["prompt_tokens"] == len(ids) <= room < len(longer)
    assert f"its first {left_out:,} messages are left out" in capsys.readouterr().err


def test_a_key_is_required_and_never_shown(endpoint, capsys):
    with serving(build_app(endpoint, key=KEY)) as address:
        for sent in (None, "Bearer", f"Bearer {KEY}x", KEY, "Bearer 狐".encode()):
            headers = {"Authorization": sent} if sent else {}
            status, error = post(address, json=BODY, headers=headers)
            assert (status, error["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            assert client.chat.completions.create(**BODY).choices
    said = capsys.readouterr()
    assert KEY not in said.out + said.err


@pytest.fixture
def stopped_early(endpoint, monkeypatch):
    """An application of its own whose answers get no time to end."""
    monkeypatch.setattr(serving_server, "PATIENCE", 0)
    monkeypatch.setattr(serving_server, "GRACE", 1)
    served = copy.copy(endpoint.models["chat"])
    served.batcher = Batcher(served.model, 8)
    served.batcher.start()
    return build_app(Endpoint([served], 12))


def test_the_end_of_the_server_ends_answers_with_an_error(stopped_early, monkeypatch, capsys):
    """Neither a text without end nor a body that does not arrive keeps it from ending."""
    # The batch's thread waits for the stop in the middle of a text
    monkeypatch.setattr(Job, "accept", lambda job, token: job.written.append(token) is None)
    body = json.dumps(BODY | {"stream": True, "max_tokens": 1000}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
    request = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with serving(stopped_early) as address:
        host, port = address.removeprefix("http://").split(":")
        streaming, silent = (socket.create_connection((host, int(port))) for _ in range(2))
        silent.sendall(request[:-1])
        streaming.sendall(request)
        received = streaming.recv(1 << 16)  # the stream has begun
    with streaming, silent:
        while chunk := streaming.recv(1 << 16):
            received += chunk
        assert b'"the server is being stopped."' in received
        assert received.endswith(b"\r\n0\r\n\r\n")  # complete, as HTTP has it
        assert silent.recv(10) == b"HTTP/1.1 5"
    assert "Traceback" not in capsys.readouterr().err


# The command


def test_a_signal_ends_the_command_cleanly(directories, capsys, monkeypatch, tmp_path):
    # Tests that a script starts in the background ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    addresses: Queue = Queue()
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")

    said: Queue = Queue()
    monkeypatch.setattr("minimind.commands.serve.say", said.put)

    def use_and_stop():
        try:
            while "Ctrl-C" not in (text := said.get(timeout=PATIENCE)):
                pass
            url = f"{text.split()[0]}/chat/completions"
            headers = {"Authorization": f"Bearer {KEY}"}
            body = BODY | {"max_tokens": 2}
            addresses.put(httpx.post(url, json=body, headers=headers, timeout=PATIENCE).status_code)
        finally:
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        thread = threading.Thread(target=use_and_stop)
        thread.start()
        run_cli("serve", directories[0], "--port", 0, "--api_key_file", key)
        thread.join()
        assert addresses.get(timeout=PATIENCE) == 200
        assert signal.getsignal(number) not in (None, signal.SIG_IGN)
        assert capsys.readouterr().err.endswith("stopped\n")


def test_an_export_is_made_once_for_the_same_weights(directories, capsys):
    first = serving_models.exported(directories[0])
    assert "exporting" in capsys.readouterr().err
    assert serving_models.exported(directories[0]) == first
    assert capsys.readouterr().err == ""
    assert json.loads((first / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert serving_models.exported(str(first)) == first  # an export is served as it is


def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    directories, capsys, monkeypatch, tmp_path
):
    def refused(*words):
        return failure(capsys, run_cli, "serve", *words)

    monkeypatch.setattr(serving_models.Served, "__init__", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(directories[0], "--port", port).startswith(
            f"--host 127.0.0.1 --port {port}: cannot be used (Address already in use)"
        )
    assert "cannot be used" in refused(directories[0], "--host", "no.such.host.invalid")
    assert "found it twice" in refused(directories[0], directories[0])
    (tmp_path / "key").write_text("short")
    assert "found no usable key" in refused(directories[0], "--api_key_file", tmp_path / "key")
    assert "no such file" in refused(directories[0], "--api_key_file", tmp_path / "none")
    monkeypatch.undo()
    assert "no such directory" in refused(tmp_path / "none", "--port", 0)
    assert "is not a complete stage directory" in refused(tmp_path, "--port", 0)
    assert "is a reward model" in refused(directories[2], "--port", 0)


def test_names_are_as_short_as_tells_models_apart():
    assert names_of(["runs/a/dpo"]) == ["dpo"]
    assert names_of(["runs/a/dpo", "runs/b/dpo"]) == ["a/dpo", "b/dpo"]
    with pytest.raises(UserError, match="found it twice"):
        names_of(["runs/dpo", "runs/dpo/"])
