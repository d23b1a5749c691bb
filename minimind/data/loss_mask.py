"""Which tokens of a conversation are trained, and how much each counts."""

from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.files import BadRowError
from minimind.data.packing import IGNORED


def with_weights(conversation: Conversation, args: ChatArguments) -> Conversation:
    """The conversation with a "weight" for each reply, 0 for those that are not trained; raises
    BadRowError."""
    replies = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    given = [conversation.messages[index].get("weight") for index in replies] + [
        conversation.weight
    ]
    if args.weighted_loss is None and any(weight not in (None, 0, 1) for weight in given):
        raise BadRowError(
            f"found weights other than 0 and 1 ({', '.join(map(str, given))}). Say what they are:"
            " --weighted_loss true multiplies the losses by them, --weighted_loss false ignores"
            " them"
        )
    messages = list(conversation.messages)
    for index in replies:
        weight = messages[index].get("weight", 0.0 if args.train_turns == "flags" else 1.0)
        if args.train_turns == "last" and index != replies[-1]:
            weight = 0.0
        messages[index] = {
            **messages[index],
            "weight": weight if args.weighted_loss else float(weight > 0),
        }
    return conversation._replace(
        messages=messages, weight=conversation.weight if args.weighted_loss else 1.0
    )


def to_row(conversation: Conversation, encoded: EncodedChat, args: ChatArguments) -> dict | None:
    """input_ids and labels (-100: not trained), with loss_weights where they may differ; None:
    nothing is trained.

    The weight of a token is (row weight) x (message weight), with --loss_normalization conversation
    divided by the row's sum of message weights.
    """
    weights = [
        message["weight"] for message in conversation.messages if message["role"] == "assistant"
    ]
    trained = [
        (start, end, weight)
        for (start, end), weight in zip(encoded.replies, weights, strict=True)
        if weight
    ]
    total = sum(weight * (end - start) for start, end, weight in trained)
    if not total * conversation.weight:
        return None
    labels = [IGNORED] * len(encoded.ids)
    for start, end, _ in trained:
        labels[start:end] = encoded.ids[start:end]
    row = {"input_ids": encoded.ids, "labels": labels}
    if args.needs_weights:
        scale = conversation.weight / (total if args.loss_normalization == "conversation" else 1.0)
        row["loss_weights"] = [0.0] * len(encoded.ids)
        for start, end, weight in trained:
            row["loss_weights"][start:end] = [weight * scale] * (end - start)
    if encoded.roles:
        row["roles"] = encoded.roles
    return row
