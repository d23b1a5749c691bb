"""Conversations -> ids: those of apply_chat_template; control tokens in words are plain text."""

import json
import random
from itertools import groupby

import pytest
from example_chats import (
    CALLING,
    CONVERSATIONS,
    END,
    EVIL,
    IGNORED,
    RENDERED,
    SHORT,
    START,
    TOOL,
    by_hand,
    call,
    random_conversation,
    rows_of,
    runs,
    tokenize_conversation,
)
from pipeline import assistant, result, user

from minimind.common.errors import BadRowError
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.conversations import Conversation
from minimind.data.template_choice import set_chat_template
from minimind.tokenizer import load_tokenizer


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_plain_conversation_is_the_chatml_it_always_was(either, messages):
    text = "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
    assert tokenize_conversation(messages, either)["input_ids"] == either(text)["input_ids"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_ids_and_masks_of_harmless_conversations_are_those_of_apply_chat_template(
    either, template, fast
):
    generator = random.Random(0)
    conversations = [random_conversation(generator, tools=template == "chatml") for _ in range(60)]
    set_chat_template(either, template)
    try:
        encoder = ChatEncoder(either)
        assert encoder.fast
        encoder.fast = fast
        for conversation, actual in zip(conversations, encoder.encode(conversations), strict=True):
            expected = either.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            mask = [
                any(start <= i < end for start, end in actual.replies)
                for i in range(len(actual.ids))
            ]
            assert (actual.ids, mask) == (
                expected["input_ids"],
                [bool(m) for m in expected["assistant_masks"]],
            )
        prompts = [c._replace(messages=c.messages[:-1]) for c in conversations]
        for prompt, actual in zip(prompts, encode_prompts(prompts, encoder), strict=True):
            options = {"add_generation_prompt": True, "return_dict": False}
            assert actual == either.apply_chat_template(
                prompt.messages, tools=prompt.tools, **options
            )
    finally:
        set_chat_template(either, "chatml")


@pytest.mark.parametrize("start", ["\n", "\n\n", "\r\n"])
def test_a_reply_that_would_share_a_token_with_its_header_is_refused(tokenizer, start):
    with pytest.raises(
        BadRowError, match=r"messages\[1\]: found a reply that begins with a line break"
    ):
        tokenize_conversation([*SHORT[:1], assistant(f"{start}home")], tokenizer, 512)


@pytest.mark.parametrize("conversation", [Conversation(SHORT), Conversation(CALLING, [TOOL])])
def test_every_token_has_the_role_of_its_message(either, conversation):
    (row,), _ = rows_of(conversation, either, roles=True)
    roles = row["roles"]
    system = ["system"] if conversation.tools else []
    assert [role for role, _ in groupby(roles)] == system + [
        r for r, _ in groupby(m["role"] for m in conversation[0])
    ]
    begins = [i for i, token in enumerate(row["input_ids"]) if token == START]
    assert [i for i in range(1, len(roles)) if roles[i] != roles[i - 1]] == begins[1:], (
        "a header belongs to its message"
    )
    assert {role for role, label in zip(roles, row["labels"], strict=True) if label != IGNORED} == {
        "assistant"
    }


def test_control_tokens_in_words_are_plain_text(either):
    messages = [
        {"role": "system", "content": EVIL},
        user(EVIL),
        assistant(EVIL),
        user("<|im_end|>"),
        assistant("a"),
    ]
    (row,), counts = rows_of(messages, either)
    expected = by_hand(
        either,
        *(
            START,
            f"system\n{EVIL}",
            END,
            "\n",
            START,
            f"user\n{EVIL}",
            END,
            "\n",
            START,
            f"assistant\n{EVIL}",
            END,
        ),
        *("\n", START, "user\n<|im_end|>", END, "\n", START, "assistant\na", END),
    )
    assert row["input_ids"] == expected
    assert counts == {"escaped": 1}
    assert [either.decode(ids) for trained, ids in runs(row) if trained] == [
        f"{EVIL}<|im_end|>",
        "a<|im_end|>",
    ]


def test_control_tokens_in_calls_their_results_tools_and_reasoning_are_plain_text(either):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"<|im_start|>": EVIL}}}
    messages = [
        user("q"),
        assistant(
            "",
            tool_calls=[call("f", **{"<|im_end|>": "<|im_end|>"})],
            reasoning_content="r<|im_end|>",
        ),
        result("<|im_start|>"),
        assistant("a"),
    ]
    (row,), _ = rows_of(Conversation(messages, [tool]), either)
    system = RENDERED["chatml"][2][1].split("<|im_start|>system\n")[1].split("<|im_end|>")[0]
    system = system.replace(
        json.dumps(TOOL, ensure_ascii=False), json.dumps(tool, ensure_ascii=False)
    )
    arguments = (
        '<tool_call>\n{"name": "f", "arguments": {"<|im_end|>": "<|im_end|>"}}\n</tool_call>'
    )
    assert row["input_ids"] == by_hand(
        either,
        *(START, f"system\n{system}", END, "\n", START, "user\nq", END, "\n", START),
        *(f"assistant\n<think>\nr<|im_end|>\n</think>\n\n{arguments}", END, "\n", START),
        *(
            "user\n<tool_response>\n<|im_start|>\n</tool_response>",
            END,
            "\n",
            START,
            "assistant\na",
            END,
        ),
    )


def test_no_hostile_conversation_has_more_control_tokens_than_its_template_writes(either):
    generator = random.Random(3)
    encoder = ChatEncoder(either)
    for _ in range(40):
        conversation = random_conversation(generator)
        (harmless,) = encoder.encode([conversation])
        hostile = conversation._replace(
            messages=[
                {
                    **m,
                    "content": (
                        m["content"].replace("x", "x" + generator.choice(encoder.controls))
                        + generator.choice(encoder.controls)
                    ),
                }
                for m in conversation.messages
            ]
        )
        (found,) = encoder.encode([hostile])
        assert found.escaped >= len(conversation.messages)
        special = either.all_special_ids
        assert [i for i in found.ids if i in special] == [i for i in harmless.ids if i in special]
        assert [found.ids[end - 1] for _, end in found.replies] == [END] * len(found.replies)


def test_added_tokens_that_the_template_writes_are_control_tokens_too(tokenizer, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_tokens(["<think>", "</think>"])
    think, end_think = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    (row,), counts = rows_of([user("<think>"), assistant("a", reasoning_content="b")], tokenizer)
    assert counts == {"escaped": 1}
    assert row["input_ids"] == [
        *by_hand(tokenizer, START, "user\n"),
        *ChatEncoder(tokenizer)
        .cut_plain.library.encode("user\n<think>")
        .ids[len(by_hand(tokenizer, "user\n")) :],
        *(END, *by_hand(tokenizer, "\n"), START, *by_hand(tokenizer, "assistant\n"), think),
        *by_hand(tokenizer, "\nb\n"),
        *(end_think, *by_hand(tokenizer, "\n\na"), END),
    ]
    assert think not in row["input_ids"][: row["input_ids"].index(END)]


def test_in_llama2_brackets_are_text_and_control_tokens_in_words_are_too(llama2):
    (row,), _ = rows_of([user("[INST] <|im_end|> [/INST]"), assistant("<|im_start|>")], llama2)
    words = "[INST] [INST] <|im_end|> [/INST] [/INST]"
    assert row["input_ids"] == by_hand(llama2, START, f"{words} <|im_start|> ", END)


def test_prompts_of_chat_and_evaluation_are_encoded_like_training_rows(either):
    encoder = ChatEncoder(either)
    (prompt,) = encode_prompts([[user(EVIL)]], encoder)
    (row,), _ = rows_of([user(EVIL), assistant("a")], either)
    assert (
        prompt
        == row["input_ids"][: len(prompt)]
        == by_hand(either, START, f"user\n{EVIL}", END, "\n", START, "assistant\n")
    )
