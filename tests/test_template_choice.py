"""The chat templates that a tokenizer can be trained with, and those that are refused."""

import json
import random
from pathlib import Path

import pytest
from example_chats import CALLING, SHORT, TOOL, call, chat, marked, random_conversation, rows_of
from pipeline import assistant, result, user
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.conversations import Conversation
from minimind.data.template_choice import set_chat_template
from minimind.tokenizer import DEFAULT_TOKENIZER, load_tokenizer, train_tokenizer


def test_the_default_tokenizer_has_the_shipped_template():
    assert (DEFAULT_TOKENIZER / "chat_template.jinja").read_text() == load_tokenizer().chat_template
    assert load_tokenizer().chat_template == (DEFAULT_TOKENIZER.parent / "chatml.jinja").read_text()


def test_tools_and_reasoning_are_written_as_in_the_published_qwen3_template(tokenizer):
    """But for the empty reasoning that Qwen3 writes where there is none, and the newline after the
    last message."""
    published = Path(trl_templates._CHAT_TEMPLATES_DIR, "qwen3.jinja").read_text(encoding="utf-8")
    generator = random.Random(1)
    for _ in range(100):
        messages, tools, _ = random_conversation(generator)
        ours = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, chat_template=published
        )
        assert ours == theirs.replace("<think>\n\n</think>\n\n", "").removesuffix("\n")


def test_a_template_is_read_from_a_file_of_the_user(tokenizer, tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content +"
        " eos_token }}{% endgeneration %}{% else %}{{ m.role }}:{{ m.content }};{% endif %}{%"
        " endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    try:
        set_chat_template(tokenizer, str(tmp_path / "own.jinja"))
        (row,), _ = rows_of(chat("hi", "yo", "x", "y"), tokenizer)
        with pytest.raises(
            BadRowError, match="the chat template has no place for tools, found 'add'"
        ):
            rows_of(Conversation(SHORT, [TOOL]), tokenizer)
        with pytest.raises(
            BadRowError,
            match=r"messages\[1\]: the chat template has no place for calls, found one of 'add'",
        ):
            rows_of(
                [user("1+1?"), assistant("", tool_calls=[call(a=1)]), result("2"), assistant("2")],
                tokenizer,
            )
        with pytest.raises(BadRowError, match="the chat template has no place for reasoning"):
            rows_of([user("hi"), assistant("yo", reasoning_content="hm")], tokenizer)
    finally:
        set_chat_template(tokenizer, "chatml")
    assert marked(row, tokenizer) == "user:hi;A:⟦yo<|im_end|>⟧user:x;A:⟦y<|im_end|>⟧"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "does not begin where the template's prompt for one ends",
        ),
        (
            (
                "{% for m in messages %}{{ '<|start|>' + m.role + m.content + '<|stop|>' }}{%"
                " endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
            ),
            (
                "the template writes '<|stop|>' after a reply, expected a control token of this"
                " tokenizer"
            ),
        ),
        ("{% generation %}{{ 1 / 0 }", "a question and its answer fail"),
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            "marks 2 replies",
        ),
        (
            (
                "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{%"
                " endgeneration %}{{ eos_token }}{% else %}{{ m.content }};{% endif %}{% endfor %}"
            ),
            "the generation block does not end with an end token such as '<|im_end|>'",
        ),
        (
            "{% for m in messages %}{% generation %}x{% endgeneration %}{% endfor %}",
            "marks 2 replies",
        ),
        (
            (
                "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}{{"
                " eos_token }}{% endgeneration %}{% endfor %}"
            ),
            "messages[0]: the chat template leaves out words of the role 'user'",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_and_the_old_one_kept(
    tokenizer, tmp_path, template, reason
):
    before = tokenizer.chat_template
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(UserError) as caught:
        set_chat_template(tokenizer, str(tmp_path / "bad.jinja"))
    assert reason in str(caught.value)
    assert str(tmp_path / "bad.jinja") in str(caught.value)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize("choice", [None, "chatml"])
def test_the_token_that_ends_replies_becomes_the_end_token_of_a_base_models_tokenizer(
    choice, capsys
):
    base = train_tokenizer([""], vocab_size=259)
    base.eos_token = base.pad_token = "<|endoftext|>"
    set_chat_template(base, choice)
    assert (base.eos_token, base.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (
        "replies end with '<|im_end|>', which replaces '<|endoftext|>' as the end token"
        in capsys.readouterr().out
    )
    set_chat_template(base, choice)
    assert not capsys.readouterr().out


def test_a_tokenizer_without_the_tokens_of_a_template_is_refused_and_can_use_another():
    state = json.loads(train_tokenizer([""], vocab_size=259).backend_tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:1]
    gpt2 = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    with pytest.raises(UserError) as caught:
        set_chat_template(gpt2, None)
    assert "the tokenizer has no chat template" in str(caught.value)
    with pytest.raises(UserError) as caught:
        set_chat_template(gpt2, "chatml")
    assert (
        "replies end with '<|im_end|>', which is no token of this tokenizer: it has '<|endoftext|>'"
        in str(caught.value)
    )
    set_chat_template(gpt2, "llama2")
    (found,) = ChatEncoder(gpt2).encode([Conversation(SHORT)])
    assert (
        gpt2.decode(found.ids[slice(*found.replies[0])]) == f" {SHORT[1]['content']} <|endoftext|>"
    )


def test_a_template_that_does_not_exist_is_refused_with_those_that_do(tokenizer):
    with pytest.raises(
        UserError, match=r"--chat_template llama: found no such file, expected chatml or llama2"
    ):
        set_chat_template(tokenizer, "llama")


def test_llama2_refuses_tools_and_reasoning(llama2):
    for conversation in (
        Conversation(SHORT, [TOOL]),
        Conversation(CALLING),
        Conversation(CALLING[:1] + CALLING[-1:]),
    ):
        with pytest.raises(BadRowError, match="the llama2 template has no place for"):
            rows_of(conversation, llama2)
