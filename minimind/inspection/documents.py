"""The inspection of pretraining data: blocks of documents, and the texts they were made from."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.inspection.findings import Findings
from minimind.inspection.inspection import Inspection
from minimind.inspection.lengths import describe_lengths
from minimind.inspection.mask_checks import check_tokenizer
from minimind.inspection.messages import count_roles
from minimind.inspection.row_checks import CUT_SHARE, add_copies, add_overlap
from minimind.inspection.text_checks import check_boundaries, check_special_tokens
from minimind.inspection.texts import DocumentTexts
from minimind.inspection.tokens import Tokens, ratio
from minimind.tokenizer import text_bytes

# Of the tokens: more than this share of parts of characters, and the tokenizer does not fit.
PARTS_SHARE = 0.1


class Documents:
    """The counterpart of `Messages` for blocks: their tokens are the documents' own, or the end
    tokens between them."""

    names = roles = np.array(["document", "end"])
    role = np.array([0, 1])

    def __init__(self, tokens: Tokens, tokenizer: PreTrainedTokenizerFast):
        self.of_token = (tokens.ids == tokenizer.eos_token_id).astype(np.int64)


def document_lengths(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The tokens of each document, its end token included, as far as it lies in the blocks."""
    ends = np.flatnonzero(tokens.ids == tokenizer.eos_token_id) + 1
    return np.diff(np.union1d(ends, [0, len(tokens.ids)]))


def inspect_documents(
    blocks: Dataset,
    facts: dict,
    texts: DocumentTexts,
    tokenizer: PreTrainedTokenizerFast,
    held_out: DocumentTexts | None = None,
    findings: Findings | None = None,
) -> Inspection:
    """Inspect the blocks of `documents.load_blocks`.

    Args:
        blocks: rows of ids.
        facts: what `load_blocks` counted of them.
        texts: the texts they were made from.
        tokenizer: their tokenizer.
        held_out: the held-out texts.
        findings: those of earlier checks.
    """
    findings = Findings() if findings is None else findings
    check_tokenizer(findings, tokenizer)
    tokens = Tokens(blocks, [f"block {number}" for number in range(1, len(blocks) + 1)])
    documents = Documents(tokens, tokenizer)
    total, dropped = facts["documents"], facts["dropped_tokens"]

    # End tokens between the documents; each dropped token ended at most one.
    ends = int(documents.of_token.sum())
    if ends < total - dropped:
        text = f"{total:,} documents, but only {ends:,} end tokens between them"
        advice = (
            f"Each document must be followed by {tokenizer.eos_token!r}, or the model learns to"
            " run on."
        )
        findings.add("documents_not_separated", "error", total - ends, text, advice)

    # Tokens that are parts of a character.
    is_part = np.array([not _is_text(piece) for piece in text_bytes(tokenizer)])
    parts = int(is_part[tokens.ids].sum())
    part_share = ratio(parts, len(tokens.ids))
    if part_share > PARTS_SHARE:
        text = f"{part_share:.1%} of the tokens are parts of a character"
        advice = (
            "The tokenizer knows few of these characters: one trained on such text, or a larger"
            " one, takes fewer."
        )
        findings.add("split_characters", "warning", parts, text, advice)

    # The tail that fills no block.
    dropped_share = ratio(dropped, facts["tokens"])
    if dropped_share > CUT_SHARE:
        text = f"{dropped:,} tokens ({dropped_share:.1%}) at the end do not fill a block"
        advice = "They are left out. With so little text, take a smaller --block_size."
        findings.add("dropped_tail", "warning", dropped, text, advice)

    # The texts themselves.
    copies, share = len(texts.copies), ratio(len(texts.copies), texts.count)
    text = f"{copies:,} of {texts.count:,} documents ({share:.1%}) are copies of an earlier one"
    add_copies(findings, texts.copies, text)
    if held_out:
        first = texts.first
        both = [(where, first[key]) for key, where in held_out.first.items() if key in first]
        text = f"{len(both):,} of {held_out.count:,} held-out documents are trained on too"
        add_overlap(findings, both, text)
    check_boundaries(findings, texts)
    check_special_tokens(findings, texts)

    trained = int(tokens.trained.sum())
    report = {
        "stage": "pretrain",
        "rows": len(tokens),
        "documents": total,
        "bytes": texts.bytes,
        "bytes_per_token": round(texts.bytes / max(facts["tokens"] - total, 1), 3),
        "end_tokens": ends,
        "dropped_tokens": dropped,
        "dropped_share": dropped_share,
        "partial_character_share": part_share,
        "tokens": len(tokens.ids),
        "trained_tokens": trained,
        "trained_share": ratio(trained, len(tokens.ids)),
        "roles": count_roles(tokens, documents),
        "lengths": describe_lengths(document_lengths(tokens, tokenizer), of="document"),
        "findings": findings.in_order(),
    }
    return Inspection("pretrain", tokens, documents, report)


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
