"""A chat template's text -> token ids, and where in them the assistant speaks.

Only what the template itself writes becomes a control token; the same characters in somebody's
words are plain text.
"""

import json
import re
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.conversations import Conversation
from minimind.data.messages import Message
from minimind.data.rendering import ChatRenderer, Span, all_words
from minimind.tokenizer import token_byte_lengths
from minimind.tokenizer.cutting import PIECE, Cutter
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError

FEW = 16  # conversations for which setting up the fast engine does not pay
Rendered = tuple[Conversation, str, list[Span]]


class EncodedChat(NamedTuple):
    """The ids of a rendered conversation.

    `replies` are the spans in `ids` that the assistant emits, one for each of its messages;
    `escaped` counts the control tokens in somebody's words that became plain text; `roles`, if
    requested, are the role whose message each token belongs to.
    """

    ids: list[int] | array  # an array of 4 bytes each if there are many
    replies: list[Span]
    escaped: int = 0
    roles: list[str] | None = None


class ChatEncoder(ChatRenderer):
    """Conversations -> ids by a tokenizer's chat template.

    Identical to `apply_chat_template` except: a control token in somebody's words is encoded as the
    plain text that it is there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        ids = tokenizer.convert_tokens_to_ids(self.controls)
        self.control_ids = dict(zip(self.controls, ids, strict=True))
        # A post-processor would add special tokens, which the template writes, or trim offsets,
        # which would hide spaces
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(post_processor=None, padding=None, truncation=None)
        self.library = Tokenizer.from_str(json.dumps(state))
        self.bytes_of = np.asarray(token_byte_lengths(tokenizer), dtype=np.int32)
        for token, index in self.control_ids.items():
            self.bytes_of[index] = len(token.encode())

    @cached_property
    def cut(self) -> Cutter:
        """Cuts long texts for the library's tokenizer."""
        return Cutter(self.library)

    @cached_property
    def cut_plain(self) -> Cutter:
        """The same for a tokenizer without added tokens: to it "<|im_end|>" is ten characters."""
        state = {**json.loads(self.library.to_str()), "added_tokens": []}
        return Cutter(Tokenizer.from_str(json.dumps(state)))

    @cached_property
    def segments(self) -> DocumentEncoder:
        """The fast engine for the text between two control tokens."""
        return DocumentEncoder(self.tokenizer)

    @cached_property
    def fast(self) -> bool:
        """Whether text between two control tokens can be encoded alone, as in byte-level BPE."""
        added = self.tokenizer.added_tokens_decoder.values()
        is_greedy = any(token.lstrip or token.rstrip or token.single_word for token in added)
        return self.segments.engine is not None and not is_greedy

    def encode(
        self, conversations: Sequence[Conversation], prompt: bool = False, roles: bool = False
    ) -> list[EncodedChat | BadRowError]:
        """Return each conversation's ids, or why it has none.

        With `prompt`, the ids end with the header of the next reply.
        """
        results: list[Any] = [None] * len(conversations)
        batch: dict[int, Rendered] = {}  # for the fast engine, by index
        for index, conversation in enumerate(conversations):
            try:
                if self.pattern.search(all_words(conversation)):
                    results[index] = self._encode_escaped(conversation, prompt, roles)
                    continue
                text, spans = self.render(conversation, prompt)
                if (len(conversations) > FEW or len(text) > PIECE) and self.fast:
                    batch[index] = conversation, text, spans
                else:
                    ids, begins = array("i"), array("q")
                    self._append(self.cut, text, ids, begins)
                    begins.append(len(text))
                    results[index] = self._finish((conversation, text, spans), ids, begins, roles)
            except BadRowError as problem:
                results[index] = problem
        if not batch:
            return results

        try:
            encoded = self._encode_batch(list(batch.values()), roles)
        except WrongIdsError:
            self.fast = False
            return self.encode(conversations, prompt, roles)
        except BadRowError as problem:  # in one of them a word is too long for the tokenizer
            encoded = [problem]
            if len(batch) > 1:
                encoded = [self.encode([each], prompt, roles)[0] for each, *_ in batch.values()]
        for index, result in zip(batch, encoded, strict=True):
            results[index] = result
        return results

    def _encode_batch(self, batch: list[Rendered], roles: bool) -> list[EncodedChat | BadRowError]:
        """Encode conversations without control tokens in their words by one call of the fast
        engine."""
        # Its input: the text between control tokens, and a mark (-1) after each conversation
        segments, controls = [], []
        for _, text, _ in batch:
            segments += self.pattern.split(text)
            controls += [self.control_ids[token] for token in self.pattern.findall(text)] + [-1]

        # It ends each segment with an end token: the place of a control token or mark
        ids = self.segments(segments).astype(np.int32)
        places, controls = np.flatnonzero(ids == self.segments.eos_token_id), np.asarray(controls)
        ids[places] = controls

        # The byte at which each token begins, a mark being one byte. As narrow as possible, because
        # a long reply of rare characters has as many tokens as bytes
        lengths = self.bytes_of[ids]
        lengths[ids < 0] = 1
        begins = np.cumsum(lengths, dtype=np.int32 if lengths.sum() < 2**31 else np.int64)
        begins -= lengths

        results: list[EncodedChat | BadRowError] = []
        start = 0
        for rendered, stop in zip(batch, places[controls < 0].tolist(), strict=True):
            in_bytes = partial(_bytes_until, rendered[1], int(begins[start]))
            own_ids, own_begins = ids[start:stop], begins[start : stop + 1]
            try:
                results.append(self._finish(rendered, own_ids, own_begins, roles, in_bytes))
            except BadRowError as problem:
                results.append(problem)
            start = stop + 1
        return results

    def _encode_escaped(self, conversation: Conversation, prompt: bool, roles: bool) -> EncodedChat:
        """Encode a conversation with control tokens in its words.

        Renders again with those covered by as many characters that occur nowhere else: a control
        token that is still there is the template's.
        """
        words, count = all_words(conversation), len(self.controls)
        # Private characters, those of two bytes first: with one wider character, Python keeps the
        # entire text in four bytes each
        private = chain(
            range(0xE002, 0xF900 - count, count), range(0xF0000, 0x110000 - count, count)
        )
        base = next(b for b in private if not any(chr(b + i) in words for i in range(count)))
        cover = {token: chr(base + index) * len(token) for index, token in enumerate(self.controls)}
        names = {covered: token for token, covered in cover.items()}
        covers = re.compile("|".join(names))

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self.pattern.sub(lambda match: cover[match.group()], value)
            if isinstance(value, dict):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        text, _ = self.apply_template(conversation, prompt)
        covered, spans = self.render(conversation._replace(**hide(conversation._asdict())), prompt)
        if covers.sub(lambda match: names[match.group()], covered) != text:
            raise BadRowError(
                f"found {self.pattern.search(words).group()!r} inside the text, and the chat"
                " template rewrites the text there, so it cannot be told from its own. Remove it"
            )
        ids, begins, position = array("i"), array("q"), 0
        for match in chain(self.pattern.finditer(covered), [None]):
            end = match.start() if match else len(text)
            self._append(self.cut_plain, text[position:end], ids, begins, position)
            if match:
                ids.append(self.control_ids[match.group()])
                begins.append(end)
                position = match.end()
        begins.append(len(text))
        encoded = self._finish((conversation, text, spans), ids, begins, roles)
        return encoded._replace(escaped=len(covers.findall(covered)))

    def _append(self, cut: Cutter, text: str, ids: array, begins: array, position=0) -> None:
        """Append a text's ids by the library's tokenizer, and the character where each begins."""
        for piece in cut(text):
            encoding = cut.library.encode(piece, add_special_tokens=False)
            ids.extend(encoding.ids)
            begins.extend(position + start for start, _ in encoding.offsets)
            position += len(piece)

    def _finish(
        self, rendered: Rendered, ids, begins, roles: bool, units: Callable = list
    ) -> EncodedChat:
        """Find the replies, and the roles if requested, among the ids of a conversation.

        Args:
            ids, begins: of each token, an array or numpy's; last in `begins` is the text's end.
            units: ascending positions in characters -> in the units of `begins`.
        """
        conversation, text, spans = rendered
        begins = np.asarray(begins)
        edges = np.array(units([edge for span in spans for edge in span]), dtype=begins.dtype)
        tokens = np.searchsorted(begins, edges)  # the first of several that share a character
        if (begins[tokens] != edges).any():
            raise BadRowError(
                "found a reply that shares a token with what stands before or after it, expected a"
                " border between tokens"
            )
        owners = None
        if roles:
            places, names = self.find_roles(conversation, text, spans)
            places = np.array(units(places), dtype=begins.dtype)
            indices = np.searchsorted(places, begins[:-1], side="right") - 1
            owners = [names[index] for index in indices]
        tokens = tokens.tolist()
        replies = list(zip(tokens[::2], tokens[1::2], strict=True))
        listed = ids.tolist() if len(ids) <= PIECE else array("i", ids.tobytes())
        return EncodedChat(listed, replies, roles=owners)


def _bytes_until(text: str, first: int, characters: Sequence[int]) -> list[int]:
    """Convert ascending positions in characters to bytes of UTF-8, counted from `first`."""
    if text.isascii():
        return [first + character for character in characters]
    sizes = (len(text[start:end].encode()) for start, end in pairwise([0, *characters]))
    return list(accumulate(sizes, initial=first))[1:]


def encode_prompts(
    prompts: Sequence[Conversation | Sequence[Message]], encoder: ChatEncoder
) -> list[list[int]]:
    """Return the ids of conversations that end with a question, ready for the answer; raises
    UserError where the template cannot render one."""
    conversations = [p if isinstance(p, Conversation) else Conversation(list(p)) for p in prompts]
    results = encoder.encode(conversations, prompt=True)
    for number, result in enumerate(results, 1):
        if isinstance(result, BadRowError):
            raise UserError(f"prompt {number}: {result}.")
    return [result.ids for result in results]
