"""`minimind evaluate`: the loss of a model on files, and its score on the conversations in them."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.columns import Columns
from minimind.data.conversations import Conversation
from minimind.evaluation.answers import read_questions, score
from minimind.evaluation.losses import RowLoss, loss_metrics, row_losses
from minimind.evaluation.scoring import ModelSubject
from minimind.evaluation.texts import losses_of, read_held_out_texts, text_losses
from minimind.inspection import recognise_stage
from minimind.tokenizer import text_encoder
from minimind.tokenizer.cutting import Cutter


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[str],
    stage: str | None = None,
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> dict:
    """Loss and bits per byte of a model on files, and on conversations (stage "sft") also the
    `score`.

    The loss of a conversation is that of its trained replies; `without_loss` counts conversations
    that have none. A document (stage "pretrain") follows an end token and ends with one; see
    `text_losses` for one longer than `max_length`.

    Raises:
        UserError: see `files.read_rows` and `Columns.stop`; or the files hold preference pairs, or
            the stage cannot be recognised.
    """
    columns = columns or Columns()
    stage = stage or recognise_stage(files, columns)
    if stage == "dpo":
        raise UserError(f"{files[0]}: found preference pairs, expected conversations or documents.")
    bad_rows = BadRows(on_bad_rows)
    if stage == "pretrain":
        check = Cutter(text_encoder(tokenizer)).check
        texts = read_held_out_texts(files, bad_rows, columns, check)
        losses = text_losses(ModelSubject(model, tokenizer), texts, max_length)
        metrics = loss_metrics(losses_of(texts, losses, with_ends=True))
        return {"documents": len(texts), **metrics, "bad_rows": bad_rows.count}

    questions = read_questions(files, bad_rows, ChatEncoder(tokenizer), columns)
    columns.stop()
    found = {}
    if max_new_tokens:
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        found = score(model, tokenizer, questions, **options)
    losses = conversation_losses(model, tokenizer, questions, max_length, batch_size)
    return {**found, **conversation_metrics(losses), "bad_rows": bad_rows.count}


def conversation_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[dict],
    max_length: int,
    batch_size: int,
) -> list[RowLoss | None]:
    """The loss of the trained replies of each conversation; None if none of them fits into a
    row."""
    length = min(max_length, model.config.max_position_embeddings)
    conversations = reply_rows(questions, ChatEncoder(tokenizer), length)
    rows = [row for rows in conversations for row in rows]
    losses = iter(row_losses(model, tokenizer, rows, batch_size))
    found = []
    for rows in conversations:
        own = [next(losses) for _ in rows]
        found.append(RowLoss(*map(sum, zip(*own, strict=True))) if own else None)
    return found


def conversation_metrics(losses: Sequence[RowLoss | None]) -> dict:
    """`loss_metrics`, and `without_loss`, the number of conversations without one."""
    return {"without_loss": losses.count(None), **loss_metrics([x for x in losses if x])}


def reply_rows(
    questions: Sequence[dict], encoder: ChatEncoder, max_length: int
) -> list[list[dict]]:
    """Conversations -> the rows of each, with labels on its trained replies; no rows if nothing
    fits into one, or if the template does not mark the replies."""
    conversations = [
        Conversation(question["messages"], question.get("tools")) for question in questions
    ]
    arguments = ChatArguments(weighted_loss=False)
    results = tokenize_conversations(conversations, encoder, max_length, arguments)
    return [[] if isinstance(result, BadRowError) else result.rows for result in results]
