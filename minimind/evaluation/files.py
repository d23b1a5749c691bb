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
from minimind.evaluation.losses import row_metrics
from minimind.evaluation.scoring import ModelSubject
from minimind.evaluation.texts import metrics_with_ends, read_held_out_texts, text_losses
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
        return {**metrics_with_ends(texts, losses), "bad_rows": bad_rows.count}

    encoder = ChatEncoder(tokenizer)
    questions = read_questions(files, bad_rows, encoder, columns)
    columns.stop()
    result = {}
    if max_new_tokens:
        result = score(model, tokenizer, questions, max_new_tokens, batch_size)
    max_length = min(max_length, model.config.max_position_embeddings)
    conversations = reply_rows(questions, encoder, max_length)
    result["without_loss"] = sum(not rows for rows in conversations)
    rows = [row for rows in conversations for row in rows]
    return {**result, **row_metrics(model, tokenizer, rows, batch_size), "bad_rows": bad_rows.count}


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
