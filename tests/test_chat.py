"""`minimind chat`: what a conversation keeps, its commands, and what is shown of an answer."""

import json
import re
from argparse import Namespace

import pytest
import torch

from minimind.commands.session import ChatSession, TextSession
from minimind.generation import Reply, Streamer, decode


@pytest.fixture
def make(model, tokenizer, monkeypatch):
    """A function that makes a conversation, and the list of the prompts that its model gets."""
    prompts = []

    def decode(_, tokenizer, ids, *sampling):
        prompts.append((tokenizer.decode(ids[0]), *sampling))
        return Reply(f"reply {len(prompts)}", [1, 2], True)

    monkeypatch.setattr("minimind.generation.decode", decode)

    def make(kind=ChatSession, **options):
        args = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "system": None, **options}
        return kind(model.eval(), tokenizer, Namespace(**args)), prompts

    return make


def contents(conversation):
    return [message["content"] for message in conversation.messages()]


def type_lines(conversation, *lines):
    return [conversation.take(line, interactive=True) for line in lines]


def test_retry_replaces_the_last_answer_and_undo_forgets_its_turn(make):
    chat, prompts = make()
    type_lines(chat, "one", "two", "/retry")
    assert contents(chat) == ["one", "reply 1", "two", "reply 3"]
    assert prompts[1] == prompts[2]
    type_lines(chat, "/undo")
    assert contents(chat) == ["one", "reply 1"]


def test_a_stopped_answer_is_forgotten_and_a_stopped_retry_keeps_the_old_one(make, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    chat, _ = make()
    type_lines(chat, "one")
    monkeypatch.setattr("minimind.generation.decode", stop)
    type_lines(chat, "two")
    assert contents(chat) == ["one", "reply 1"]
    type_lines(chat, "/retry")
    assert contents(chat) == ["one", "reply 1"]


def test_ctrl_c_before_the_first_token_keeps_the_session(make, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    for kind in (ChatSession, TextSession):
        chat, _ = make(kind)
        type_lines(chat, "one")
        with monkeypatch.context() as patch:
            patch.setattr(kind, "prompt", stop)
            type_lines(chat, "/retry")
        type_lines(chat, "two")
        assert [len(turn) for turn in chat.turns] == [2, 2]


def test_a_saved_conversation_is_a_training_row_and_can_be_loaded(make, tmp_path):
    chat, prompts = make(system="be brief")
    file = tmp_path / "new" / "chat.jsonl"
    type_lines(chat, "一", f"/save {file}")
    assert [each["role"] for each in json.loads(file.read_text())["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    later, _ = make()
    type_lines(later, f"/load {file}", "again")
    assert contents(later) == ["be brief", "一", "reply 1", "again", "reply 2"]
    assert "be brief" in prompts[-1][0] and "reply 1" in prompts[-1][0]


def test_the_signs_that_chinese_input_methods_write_for_a_slash_begin_commands(make):
    chat, _ = make()
    type_lines(chat, "one", "two", "／undo", "、temperature 0")
    assert contents(chat) == ["one", "reply 1"] and chat.args.temperature == 0
    assert type_lines(chat, "、你好", "／exit") == [True, False]
    assert contents(chat)[-2:] == ["、你好", "reply 3"]


@pytest.mark.parametrize("kind", [ChatSession, TextSession])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_names_the_commands_that_there_are(make, kind, language, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_LANG", language)
    chat, _ = make(kind)
    type_lines(chat, "/help")
    named = re.findall(r"^/([a-z]+)", capsys.readouterr().out, re.MULTILINE)
    assert {*named} == {*kind.COMMANDS, "exit"} - {"help"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo", "/undo: there is no message yet."),
        ("/retry", "/retry: there is no message yet."),
        ("/save x", "/save: expected a file's name, and a conversation to write."),
        ("/temperature hot", "/temperature: found hot, expected a number from 0 to 100."),
        ("/temperature -1", "/temperature: found -1, expected a number from 0 to 100."),
        ("/temperature nan", "/temperature: found nan, expected a number from 0 to 100."),
        ("/max 0", "/max: found 0, expected a number from 1 to 63."),
        ("/max", "/max: found nothing, expected a number from 1 to 63."),
        ("/load nowhere.jsonl", "nowhere.jsonl: no such file."),
        ("/temperature \x1b[2J", "/temperature: found \\x1b[2J, expected a number"),
        ("/nothing", "/nothing: no such command. See /help."),
    ],
)
def test_a_mistake_is_one_message_and_the_chat_goes_on(make, capsys, line, message):
    chat, prompts = make()
    chat.model.config.max_position_embeddings = 64
    assert type_lines(chat, line, "one") == [True, True]
    assert capsys.readouterr().out.startswith(message)
    assert contents(chat) == ["one", "reply 1"] and len(prompts) == 1


def test_save_overwrites_nothing_and_load_refuses_other_files(make, capsys, tmp_path):
    chat, _ = make()
    (tmp_path / "kept").write_text('{"messages": [{"role": "assistant", "content": "a"}]}')
    type_lines(chat, "one", f"/save {tmp_path / 'kept'}", f"/load {tmp_path / 'kept'}")
    said = capsys.readouterr().out
    assert "kept exists. Give another name." in said and "Give a file that /save wrote." in said
    assert contents(chat) == ["one", "reply 1"]


@pytest.mark.parametrize(
    "line",
    [
        "/save /proc/none/chat.jsonl",  # a directory that cannot be made
        "/save /",
        "/save ~nobody-of-this-name/chat.jsonl",
        f"/save {'x' * 300}",
        "/save a\0b",
        "/load",
        "/load /",
        "/load /dev/null",
        "/load ~nobody-of-this-name/chat.jsonl",
        f"/load {'x' * 300}",
        "/load a\0b",
    ],
)
def test_a_file_that_cannot_be_used_does_not_end_the_chat(make, capsys, line):
    chat, _ = make()
    assert type_lines(chat, "one", line, "two") == [True, True, True]
    assert capsys.readouterr().out.strip()
    assert contents(chat) == ["one", "reply 1", "two", "reply 2"]


def test_settings_reach_the_next_answer(make):
    chat, prompts = make()
    type_lines(chat, "/temperature 0", "/max 5", "one")
    assert prompts[0][1:] == (5, 0.0, 0.9)


def test_system_starts_again_with_a_system_prompt(make):
    chat, prompts = make()
    type_lines(chat, "one", "/system be\nbrief", "two", "/system", "three")
    assert "be\nbrief" in prompts[1][0] and "one" not in prompts[1][0]
    assert contents(chat) == ["three", "reply 3"] and "brief" not in prompts[2][0]


def test_exit_ends_the_chat(make):
    chat, _ = make()
    assert type_lines(chat, "/exit", "/quit") == [False, False]


def test_turns_beyond_the_window_are_left_out_of_the_prompt_but_kept(make, capsys):
    chat, prompts = make(system="be brief")
    chat.window = 60
    type_lines(chat, *(f"message number {number}" for number in range(6)))
    prompt = prompts[-1][0]
    assert "be brief" in prompt and "number 5" in prompt and "number 0" not in prompt
    assert len(chat.tokenizer(prompt).input_ids) <= 60
    assert len(contents(chat)) == 13
    said = capsys.readouterr().err
    assert "longer than the 60 tokens that the model can read" in said and "turns" in said


def test_a_message_beyond_the_window_is_cut_on_the_left_and_that_is_said(make, capsys):
    chat, prompts = make()
    chat.window = 20
    type_lines(chat, "first " * 50 + "last")
    assert prompts[0][0].count("first") < 20 and "last" in prompts[0][0]
    assert "and there is room for 20: its first" in capsys.readouterr().err


def test_a_base_model_continues_the_text_and_an_empty_line_continues_further(make, tokenizer):
    chat, prompts = make(TextSession)
    type_lines(chat, "", "The fox", "", "/retry", "/undo", "")
    end = tokenizer.eos_token
    assert [prompt for prompt, *_ in prompts] == [
        f"{end}The fox",
        f"{end}The foxreply 1",
        f"{end}The fox",
    ]


def test_the_streamer_never_shows_half_a_character_nor_a_control(default, capsys):
    tokens = default("a 你好🦊 \x1b[2J", add_special_tokens=False).input_ids
    streamer = Streamer(default)
    streamer.put(torch.tensor([[5, 6]]))  # the prompt
    shown = []
    for token in [*tokens, *default("🦊").input_ids[:1]]:
        streamer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    streamer.end()
    assert "".join(shown) == "a 你好🦊 \\x1b[2J"
    assert "�" not in streamer.text and streamer.text == "a 你好🦊 \x1b[2J"


def test_an_answer_is_shown_as_it_is_generated_and_ends_at_the_end_token(
    model, tokenizer, monkeypatch, capsys
):
    words = tokenizer("the fox runs", add_special_tokens=False).input_ids

    def generate(input_ids, streamer, **_):
        streamer.put(input_ids)
        for token in [*words, tokenizer.eos_token_id]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)
    reply = decode(model, tokenizer, torch.tensor([[1, 2]]), 8, 0.0, 1.0)
    assert reply == Reply("the fox runs", words, True)
    assert capsys.readouterr().out == "the fox runs\n"
