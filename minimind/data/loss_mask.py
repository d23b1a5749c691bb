"""Which tokens of a conversation are trained, and how much each counts in the loss.

    messages    user        assistant     user        assistant
    weights                 1                         0                 weigh_replies
    ids         u u u u u   a a a a end   u u u u u   a a end
    replies                 [---------)               [-----)           the chat template
    labels      - - - - -   a a a a end   - - - - -   - - -             masked_row

1.  `weigh_replies` decides which replies are trained: --train_turns, and what the data says of a
    message or row ("train", "weight").
2.  The chat template decides where each reply is: between its {% generation %} marks, the end token
    included. For a template without marks, borders.py finds the same.
3.  `masked_row` joins the two: the tokens of a reply with a weight are labels, all others -100.
"""

from collections.abc import Iterable

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.packing import IGNORED
from minimind.data.rendering import Span


def weigh_replies(conversation: Conversation, args: ChatArguments) -> Conversation:
    """Return the conversation with a "weight" for each reply, 0 for those that are not trained.

    Raises:
        BadRowError: the data has weights other than 0 and 1, and no option says what they mean.
    """
    messages = list(conversation.messages)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    weights = [*(messages[index].get("weight") for index in replies), conversation.weight]
    if args.weighted_loss is None and any(weight not in (None, 0, 1) for weight in weights):
        raise BadRowError(
            f"found weights other than 0 and 1 ({', '.join(map(str, weights))}). Say what they are:"
            " --weighted_loss true multiplies the losses by them, --weighted_loss false ignores"
            " them"
        )
    for index in replies:
        weight = messages[index].get("weight", 0.0 if args.train_turns == "flags" else 1.0)
        if args.train_turns == "last" and index != replies[-1]:
            weight = 0.0
        weight = weight if args.weighted_loss else float(weight > 0)
        messages[index] = {**messages[index], "weight": weight}
    row_weight = conversation.weight if args.weighted_loss else 1.0
    return conversation._replace(messages=messages, weight=row_weight)


def masked_row(chat: Conversation, encoded: EncodedChat, args: ChatArguments) -> dict | None:
    """Return a row of input_ids and labels, or None if nothing in it is trained.

    If tokens may count differently, the row has loss_weights too: (row weight) x (message weight),
    with --loss_normalization conversation divided by the sum of message weights over the row.
    """
    weights = [m["weight"] for m in chat.messages if m["role"] == "assistant"]
    spans = zip(encoded.replies, weights, strict=True)
    trained = [(start, end, weight) for (start, end), weight in spans if weight]
    total = sum(weight * (end - start) for start, end, weight in trained)
    if not total * chat.weight:
        return None
    labels = [IGNORED] * len(encoded.ids)
    for start, end, _ in trained:
        labels[start:end] = encoded.ids[start:end]
    row = {"input_ids": encoded.ids, "labels": labels}
    if args.needs_weights:
        scale = chat.weight / (total if args.loss_normalization == "conversation" else 1.0)
        row["loss_weights"] = [0.0] * len(encoded.ids)
        for start, end, weight in trained:
            row["loss_weights"][start:end] = [weight * scale] * (end - start)
    if encoded.roles:
        row["roles"] = encoded.roles
    return row


def completion_mask(length: int, replies: Iterable[Span]) -> list[int]:
    """Return 1 for each token of the replies in a preference pair and 0 for others, as in TRL."""
    mask = [0] * length
    for start, end in replies:
        mask[start:end] = [1] * (end - start)
    return mask


def preference_labels(rows: Iterable[dict]) -> list[dict]:
    """Rows of preference pairs -> a row of input_ids and labels for each reply, as in SFT."""
    labelled = []
    for row in rows:
        prompt = row["prompt_ids"]
        for name in ("chosen", "rejected"):
            reply = row[f"{name}_ids"]
            masked = zip(reply, row[f"{name}_mask"], strict=True)
            labels = [token if mask else IGNORED for token, mask in masked]
            ids = prompt + reply
            labelled.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + labels})
    return labelled
