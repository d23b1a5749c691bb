"""What is used of a conversation longer than a row."""

import pytest
from example_chats import LONG, SHORT, SYSTEM, chat, fits, rows_of, tokenize_conversation, tokenized

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.conversations import Conversation


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("turns", [1, 2])
def test_keep_last_keeps_the_system_prompt_and_the_last_turns_that_fit(
    either, system, turns, spare
):
    kept = system + LONG[-2 * turns :]
    rows, counts = rows_of(system + LONG, either, fits(kept, either) + spare)
    assert rows == tokenized([kept], either)
    assert counts == {"truncated": 1}


@pytest.mark.parametrize("replies", [1, 2])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_keep_first_ends_with_the_last_reply_that_fits(either, replies, spare):
    kept = LONG[: 2 * replies]
    rows, counts = rows_of(
        LONG, either, fits(kept, either) + spare, long_conversations="keep_first"
    )
    assert rows == tokenized([kept], either)
    assert counts == {"truncated": 1}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_split_gives_all_turns_in_several_rows_each_with_the_system_prompt(either, system):
    window = max(fits(system + LONG[:4], either), fits(system + LONG[4:], either))
    rows, counts = rows_of(system + LONG, either, window, long_conversations="split")
    assert rows == tokenized([system + LONG[:4], system + LONG[4:]], either)
    assert counts == {"split": 1}


def test_split_leaves_out_the_turns_that_fit_nowhere_and_counts_that(either):
    messages = [*SHORT, *chat("fox " * 40, "dog"), *LONG[2:4]]
    rows, counts = rows_of(messages, either, 48, long_conversations="split")
    assert rows == tokenized([SHORT, LONG[2:4]], either)
    assert counts == {"split": 1, "truncated": 1}


def test_drop_leaves_out_the_entire_conversation_and_counts_it(either):
    assert rows_of(LONG, either, 40, long_conversations="drop") == ([], {"dropped": 1})


def test_a_conversation_as_long_as_the_window_is_complete(either):
    whole = tokenized([LONG], either)
    assert rows_of(LONG, either, fits(LONG, either)) == (whole, {})


@pytest.mark.parametrize(
    ("policy", "messages", "needed", "what"),
    [
        ("keep_last", SHORT, SHORT, "in the last turn with the system prompt"),
        ("keep_last", LONG + SHORT, SHORT, "in the last turn with the system prompt"),
        ("keep_first", LONG, SHORT, "up to the end of the first reply"),
        ("split", SHORT, SHORT, "in the last turn with the system prompt"),
    ],
)
def test_a_conversation_without_a_turn_that_fits_is_dropped_with_both_numbers(
    either, policy, messages, needed, what
):
    needed = fits(needed, either)
    args = ChatArguments(long_conversations=policy)
    (found,) = tokenize_conversations(
        [Conversation(messages)], ChatEncoder(either), needed - 1, args
    )
    assert (found.rows, found.counts) == ([], {"dropped": 1})
    assert (
        found.problem == f"found {needed} tokens {what}, expected at most --max_length {needed - 1}"
    )
    with pytest.raises(BadRowError):
        tokenize_conversation(messages, either, needed - 1, args)
