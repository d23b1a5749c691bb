"""Conversations that reason in several turns."""

import random
import re
from pathlib import Path

import pytest
from example_chats import marked, random_conversation, rows_of, runs
from pipeline import assistant, user
from trl import chat_template_utils as trl_templates

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.template_choice import set_chat_template


@pytest.mark.parametrize("policy", ["keep_last", "split"])
@pytest.mark.parametrize("max_length", [None, 150])
def test_each_reply_is_trained_once_after_exactly_the_prompt_that_inference_shows(
    tokenizer, policy, max_length
):
    generator = random.Random(2)
    encoder = ChatEncoder(tokenizer)
    trained_once = 0
    for _ in range(60):
        conversation = random_conversation(generator)
        (found,) = tokenize_conversations(
            [conversation], encoder, max_length, ChatArguments(long_conversations=policy)
        )
        if isinstance(found, BadRowError):
            assert max_length, found
            continue
        # Ids of the prompt a server would build for each reply -> the words of that reply
        prompts = {}
        for start in range(len(conversation.messages) if max_length else 1):
            head = conversation.messages[:1] if conversation.messages[0]["role"] == "system" else []
            for end in range(start + 1, len(conversation.messages)):
                if conversation.messages[end]["role"] == "assistant":
                    cut = (
                        conversation.messages[start:end]
                        if not start
                        else head + conversation.messages[start:end]
                    )
                    (prompt,) = encode_prompts([conversation._replace(messages=cut)], encoder)
                    prompts[tuple(prompt)] = end
        replies = []
        for row in found.rows:
            before = []
            for trained, ids in runs(row):
                if trained:
                    replies.append(prompts[tuple(before)])
                before += ids
        expected = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if not max_length:
            assert sorted(replies) == expected
            trained_once += len(found.rows) > 1
    assert max_length or trained_once > 5, "some conversations reason before their last turn"


def test_reasoning_of_earlier_turns_is_left_out_and_its_replies_are_trained_in_rows_of_their_own(
    tokenizer,
):
    messages = [
        user("a"),
        assistant("b", reasoning_content="r1"),
        user("c"),
        assistant("d"),
        user("e"),
        assistant("f"),
    ]
    rows, counts = rows_of(messages, tokenizer)
    assert counts == {"reasoning_rows": 1}
    assert [re.sub(r"<\|im_(start|end)\|>", "", marked(row, tokenizer)) for row in rows] == [
        "user\na\nassistant\n⟦<think>\nr1\n</think>\n\nb⟧",
        "user\na\nassistant\nb\nuser\nc\nassistant\n⟦d⟧\nuser\ne\nassistant\n⟦f⟧",
    ]


def test_a_template_that_keeps_all_reasoning_needs_no_rows_of_their_own(tokenizer, tmp_path):
    template = Path(trl_templates._CHAT_TEMPLATES_DIR, "qwen3_training.jinja").read_text(
        encoding="utf-8"
    )
    (tmp_path / "keep.jinja").write_text(
        template.replace(
            "{{- '<|im_end|>\\n' }}\n        {%- endgen", "{{- '<|im_end|>' }}\n        {%- endgen"
        )
    )
    try:
        set_chat_template(tokenizer, str(tmp_path / "keep.jinja"))
        rows, _ = rows_of(
            [user("a"), assistant("b", reasoning_content="r1"), user("c"), assistant("d")],
            tokenizer,
        )
    finally:
        set_chat_template(tokenizer, "chatml")
    assert len(rows) == 1
    assert "⟦<think>\nr1\n</think>\n\nb<|im_end|>⟧" in marked(rows[0], tokenizer)
