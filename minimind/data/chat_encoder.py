"""A chat template's text -> token ids, and where in them the assistant speaks.

Only what the template itself writes becomes a control token; the same characters in somebody's
words are plain text.
"""

import json
import re
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError, pass_eval_context
from jinja2.nodes import EvalContext
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from minimind.common.errors import UserError
from minimind.data.borders import Borders, find_borders
from minimind.data.conversations import Conversation, Message
from minimind.data.files import BadRowError
from minimind.data.templates import WRITTEN, WRITTEN_PER_CHARACTER, bounded
from minimind.tokenizer import CHAT_TEMPLATE, token_byte_lengths
from minimind.tokenizer.cutting import PIECE, Cutter
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError

FEW = 16  # conversations that are not worth setting up the fast engine for
TEMPLATES = {path.stem: path for path in sorted(CHAT_TEMPLATE.parent.glob("*.jinja"))}
SHIPPED = frozenset(path.read_text(encoding="utf-8") for path in TEMPLATES.values())
GENERATION = re.compile(r"{%-?\s*generation\b")
# Private characters around a message's words while roles are looked for
OPEN, CLOSE = "\ue000", "\ue001"


class Encoded(NamedTuple):
    """A rendered conversation.

    `replies` are (start, end) in `ids` of what the assistant emits, end exclusive, one for each of
    its messages; `escaped` counts the control tokens that stood in somebody's words and became
    plain text; `roles`, where asked for, names the role whose message each token belongs to.
    """

    ids: list[int] | array  # of 4 bytes each, where there are many
    replies: list[tuple[int, int]]
    escaped: int = 0
    roles: list[str] | None = None


class ChatEncoder:
    """Conversations -> ids by a tokenizer's chat template.

    Equal to `apply_chat_template` wherever no control token stands in somebody's words. Where one
    does, the words are encoded as the plain text they are. Control tokens are the special tokens,
    and other added ones (such as <think>) that the template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.marked = bool(GENERATION.search(self.template))
        if self.marked:
            _count_once(self.template)
        added = list(tokenizer.added_tokens_decoder.values())
        controls = [
            token.content for token in added if token.special or token.content in self.template
        ]
        self.controls = sorted(controls, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.controls)) or "(?!)")
        self.control_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in controls}
        # A post-processor adds special tokens, which the template does, or trims offsets, which
        # would hide spaces.
        state = {**json.loads(tokenizer.backend_tokenizer.to_str()), "post_processor": None}
        state.update(padding=None, truncation=None)
        self.library = Tokenizer.from_str(json.dumps(state))
        self.greedy = any(token.lstrip or token.rstrip or token.single_word for token in added)
        self.bytes_of = np.asarray(token_byte_lengths(tokenizer), dtype=np.int32)
        for token, index in self.control_ids.items():
            self.bytes_of[index] = len(token.encode())

    @cached_property
    def plain(self) -> Tokenizer:
        """The library's tokenizer without added tokens: to it "<|im_end|>" is ten characters."""
        return Tokenizer.from_str(
            json.dumps({**json.loads(self.library.to_str()), "added_tokens": []})
        )

    @cached_property
    def cut(self) -> Cutter:
        """Cuts long texts for the library's tokenizer."""
        return Cutter(self.library)

    @cached_property
    def cut_plain(self) -> Cutter:
        """Cuts long texts for the one without added tokens."""
        return Cutter(self.plain)

    @cached_property
    def segments(self) -> DocumentEncoder:
        """The fast engine for what stands between two control tokens."""
        return DocumentEncoder(self.tokenizer)

    @cached_property
    def fast(self) -> bool:
        """Whether what stands between two control tokens is encoded as if it stood alone, as in
        byte-level BPE."""
        return self.segments.engine is not None and not self.greedy

    @cached_property
    def keeps_reasoning(self) -> bool:
        """Whether the template shows a reply's reasoning after the next question too; Qwen3's and
        ours do not."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
        chat[1] = {**chat[1], "reasoning_content": "(thoughts)"}
        try:
            return "(thoughts)" in self._write(Conversation(chat))[0]
        except BadRowError:
            return False

    @cached_property
    def borders(self) -> Borders:
        """What stands before and after each reply, for a template that does not mark them."""
        return find_borders(
            lambda messages, prompt: self._write(Conversation(messages), prompt)[0], self.pattern
        )

    def render(
        self, conversation: Conversation, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it the assistant speaks; no control token may stand
        in the words.

        Raises BadRowError where the template does, or where the replies cannot be found.
        """
        text, spans = self._write(conversation, prompt)
        if self.marked or prompt:
            return text, spans
        if self.borders.header.strip() in _words(conversation):
            raise BadRowError(
                f"found {self.borders.header.strip()!r} in the text, by which the chat template"
                " sets replies apart. Remove it"
            )
        return text, self.borders.find(text)

    def _write(
        self, conversation: Conversation, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and from where to where it marks what the assistant says."""
        with bounded(
            sum(len(message["content"]) for message in conversation.messages),
            self.template in SHIPPED,
        ):
            texts = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        written = len(texts[0][0])
        if written > WRITTEN and written > WRITTEN_PER_CHARACTER * (
            given := len(_words(conversation))
        ):
            raise BadRowError(
                f"the chat template writes {written:,} characters for a conversation of {given:,}"
            )
        return (texts[0][0], texts[1][0]) if self.marked else (texts[0][0], [])

    def encode(
        self, conversations: Sequence[Conversation], prompt: bool = False, roles: bool = False
    ) -> list[Encoded | BadRowError]:
        """Each conversation's ids, or why it has none; with `prompt`, followed by the header of a
        reply to come."""
        results: list[Any] = [None] * len(conversations)
        harmless = []
        for index, conversation in enumerate(conversations):
            try:
                if self.pattern.search(_words(conversation)):
                    results[index] = self._encode_hostile(conversation, prompt, roles)
                    continue
                text, spans = self.render(conversation, prompt)
                if not prompt:
                    check_rendering(conversation, text, spans)
                if (len(conversations) > FEW or len(text) > PIECE) and self.fast:
                    harmless.append((index, text, spans))
                else:
                    ids, starts = array("i"), array("q")
                    self._encode_by(self.cut, text, ids, starts)
                    results[index] = self._finish(conversation, text, spans, ids, starts, roles)
            except BadRowError as problem:
                results[index] = problem
        if harmless:
            try:
                self._encode_harmless(conversations, harmless, results, roles)
            except BadRowError as problem:  # a word too long for the tokenizer, in one of them
                if len(harmless) == 1:
                    results[harmless[0][0]] = problem
                else:
                    for index, *_ in harmless:
                        (results[index],) = self.encode([conversations[index]], prompt, roles)
            except WrongIdsError:
                self.fast = False
                return self.encode(conversations, prompt, roles)
        return results

    def _encode_harmless(
        self, conversations: Sequence[Conversation], rendered: list, results: list, roles: bool
    ) -> None:
        """Fill in the results of all `rendered`: (index, text, spans)."""
        ids, begins, starts, stops = self._encode_segments([text for _, text, _ in rendered])
        edges = []
        for start, (_, text, spans) in zip(starts, rendered, strict=True):
            edges += [
                begins[start] + edge
                for edge in _bytes_until(text, [edge for span in spans for edge in span])
            ]
        edges = np.array(edges, dtype=begins.dtype)
        found = np.searchsorted(begins, edges)
        exact, position = begins[found] == edges, 0
        for (index, text, spans), start, stop in zip(
            rendered, starts.tolist(), stops.tolist(), strict=True
        ):
            here = slice(position, position := position + 2 * len(spans))
            if not exact[here].all():
                results[index] = BadRowError(BLURRED)
                continue
            names = None
            if roles:
                places, owners = self._roles(conversations[index], text, spans)
                which = np.searchsorted(
                    _bytes_until(text, places), begins[start:stop] - begins[start], side="right"
                )
                names = [owners[owner - 1] for owner in which]
            tokens = (found[here] - start).tolist()
            replies = list(zip(tokens[::2], tokens[1::2], strict=True))
            results[index] = Encoded(
                _listed(array("i", ids[start:stop].tobytes())), replies, roles=names
            )

    def _encode_segments(
        self, texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Texts -> the ids of all, a mark after each text's; the byte at which each begins, counted
        on through all texts and a byte for each mark; and from where to where the ids of each text
        go."""
        segments, controls = [], []
        for text in texts:
            segments += self.pattern.split(text)
            controls += [self.control_ids[token] for token in self.pattern.findall(text)]
            controls.append(-1)
        # An end token after each segment: where a control token goes
        ids = self.segments(segments).astype(np.int32)
        ends, controls = np.flatnonzero(ids == self.segments.eos_token_id), np.asarray(controls)
        ids[ends] = controls
        lengths = self.bytes_of[ids]
        lengths[ids < 0] = 1
        stops = ends[controls < 0]
        # As narrow as possible: a long reply of rare characters has as many tokens as bytes.
        begins = np.cumsum(lengths, dtype=np.int32 if lengths.sum() < 2**31 else np.int64)
        begins -= lengths
        return ids, begins, np.concatenate([[0], stops[:-1] + 1]), stops

    def _finish(
        self,
        conversation: Conversation,
        text: str,
        spans: list,
        ids: array,
        starts: array,
        roles: bool,
        escaped: int = 0,
    ) -> Encoded:
        starts.append(len(text))
        starts = np.asarray(starts)
        edges = [edge for span in spans for edge in span]
        tokens = np.searchsorted(starts, edges)  # the first of several that share a character
        if not (starts[tokens] == edges).all():
            raise BadRowError(BLURRED)
        names = None
        if roles:
            places, owners = self._roles(conversation, text, spans)
            names = [
                owners[owner - 1] for owner in np.searchsorted(places, starts[:-1], side="right")
            ]
        tokens = tokens.tolist()
        return Encoded(
            _listed(ids), list(zip(tokens[::2], tokens[1::2], strict=True)), escaped, names
        )

    def _encode_hostile(self, conversation: Conversation, prompt: bool, roles: bool) -> Encoded:
        """Render again with the control tokens in the words covered up, by as many characters that
        stand nowhere else; what is a control token then is the template's."""
        words = _words(conversation)
        count = len(self.controls)
        # Private characters, those of two bytes first: one of more makes Python keep the whole text
        # in four each.
        private = chain(
            range(0xE002, 0xF900 - count, count), range(0xF0000, 0x110000 - count, count)
        )
        base = next(b for b in private if not _has_any(words, b, count))
        cover = {token: chr(base + index) * len(token) for index, token in enumerate(self.controls)}
        covers = re.compile("|".join(cover.values()))
        names = {covered: token for token, covered in cover.items()}

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self.pattern.sub(lambda match: cover[match.group()], value)
            if isinstance(value, dict):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        text, _ = self._write(conversation, prompt)
        hidden = conversation._replace(**hide(conversation._asdict()))
        covered, spans = self.render(hidden, prompt)
        if not prompt:
            check_rendering(hidden, covered, spans)
        if covers.sub(lambda match: names[match.group()], covered) != text:
            raise BadRowError(
                f"found {self.pattern.search(words).group()!r} inside the text, and the chat"
                " template rewrites the text there, so it cannot be told from its own. Remove it"
            )
        ids, starts, position = array("i"), array("q"), 0
        for match in chain(self.pattern.finditer(covered), [None]):
            end = match.start() if match else len(text)
            self._encode_by(self.cut_plain, text[position:end], ids, starts, position)
            if match:
                ids.append(self.control_ids[match.group()])
                starts.append(end)
                position = match.end()
        return self._finish(
            conversation, text, spans, ids, starts, roles, len(covers.findall(covered))
        )

    def _encode_by(
        self, cut: Cutter, text: str, ids: array, starts: array, position: int = 0
    ) -> None:
        """Append the ids of a text by a tokenizer of the library, and the character at which each
        begins."""
        for piece in cut(text):
            encoding = cut.library.encode(piece, add_special_tokens=False)
            ids.extend(encoding.ids)
            starts.extend(position + start for start, _ in encoding.offsets)
            position += len(piece)

    def _roles(
        self, conversation: Conversation, text: str, spans: list
    ) -> tuple[list[int], list[str]]:
        """At which characters the parts of the text begin, and whose they are: a message's header,
        words and end.

        Rendered again with marks around the words; "other" where that changes the text and so tells
        nothing.
        """
        marked = []
        for message in conversation.messages:
            words = message["content"].strip()
            marks = f"{OPEN}{words}{CLOSE}" if message["role"] != "assistant" else words
            marked.append(
                {
                    **message,
                    "content": message["content"].replace(words, marks, 1) if words else marks,
                }
            )
        try:
            rendered, _ = self._write(conversation._replace(messages=marked))
        except BadRowError:
            rendered = ""
        if rendered.replace(OPEN, "").replace(CLOSE, "") != text:
            return [0], ["other"]
        edges = np.cumsum([len(piece) for piece in re.split(f"[{OPEN}{CLOSE}]", rendered)]).tolist()
        # template, words, template, words ...
        said, replied = zip(edges[::2], edges[1::2], strict=False), iter(spans)
        # What stands before the first message are the tools
        begins, names, before = [0], ["system"], 0
        for message in conversation.messages:
            start, end = next(replied if message["role"] == "assistant" else said)
            header = text.rfind(self.tokenizer.bos_token or "\0", before, start)
            begins.append(before if header < 0 else header)
            names.append(message["role"])
            before = end
        return begins, names


def _listed(ids: array) -> list[int] | array:
    return ids if len(ids) > PIECE else ids.tolist()


def _count_once(template: str) -> None:
    """Make transformers see where replies begin in linear time: it joins all that is written,
    before each of them."""
    try:
        extensions = _compile_jinja_template(template).environment.extensions.values()
    except TemplateError:  # told where it is rendered
        return
    tracker = next(extension for extension in extensions if "generation" in extension.tags)
    blocks = length = 0  # of what was written before the last reply

    @pass_eval_context
    def note(context: EvalContext, caller: Callable[[], str]) -> str:
        nonlocal blocks, length
        reply = caller()
        if tracker.is_active():
            if not tracker._generation_indices:
                blocks = length = 0
            length += sum(map(len, tracker._rendered_blocks[blocks:]))
            blocks = len(tracker._rendered_blocks)
            tracker._generation_indices.append((length, length + len(reply)))
        return reply

    tracker._generation_support = note


def _bytes_until(text: str, characters: Sequence[int]) -> list[int]:
    """Ascending positions in characters -> the same in bytes of UTF-8."""
    if text.isascii():
        return list(characters)
    return list(accumulate(len(text[a:b].encode()) for a, b in pairwise([0, *characters])))


NO_TEMPLATE = (
    "the tokenizer has no chat template, so there is no form to ask the model in. A base model"
    " continues text ('minimind generate'); fine-tuning gives it a template with --chat_template"
    f" {' or '.join(TEMPLATES)}."
)
BLURRED = (
    "found a reply that shares a token with what stands before or after it, expected a border"
    " between tokens"
)


def _words(conversation: Conversation) -> str:
    """All that is not the template's, for searching."""
    texts = [json.dumps(conversation.tools, ensure_ascii=False)] if conversation.tools else []
    for message in conversation.messages:
        texts.append(message["content"])
        if len(message) > 2:
            texts.append(json.dumps(message, ensure_ascii=False))
    return "\n".join(texts)


def _has_any(text: str, first: int, count: int) -> bool:
    return any(chr(code) in text for code in range(first, first + count))


def check_rendering(conversation: Conversation, text: str, spans: list[tuple[int, int]]) -> None:
    """Raises BadRowError where a template loses words or tools, or does not mark each reply
    once."""
    replies = sum(message["role"] == "assistant" for message in conversation.messages)
    if len(spans) != replies:
        raise BadRowError(
            f"the chat template marks {len(spans)} replies for training, expected {replies}"
        )
    position, marked = 0, iter(spans)
    for index, message in enumerate(conversation.messages):
        role, words = message["role"], message["content"].strip()
        start, end = next(marked) if role == "assistant" else (position, len(text))
        found = text.find(words, max(start, position), end)
        if found < 0:
            raise BadRowError(
                f"messages[{index}]: the chat template leaves out words of the role {role!r}"
            )
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if missing := _missing(names, text, start, end):
            raise BadRowError(
                f"messages[{index}]: the chat template has no place for calls, found one of"
                f" {missing!r}"
            )
        if role != "system":  # a system prompt may stand inside the last question
            position = end if role == "assistant" else found + len(words)
        if (
            message["role"] == "assistant"
            and message["content"][:1] in ("\n", "\r")
            and message["content"]
        ):
            # The model would be trained after another beginning than the one it sees when it
            # generates.
            raise BadRowError(
                f"messages[{index}]: found a reply that begins with a line break, expected text."
                " Remove it"
            )
    if missing := _missing(
        [tool["function"]["name"] for tool in conversation.tools or ()], text, 0, len(text)
    ):
        raise BadRowError(f"the chat template has no place for tools, found {missing!r}")
    last = conversation.messages[-1]
    if last.get("reasoning_content", "") not in text:
        raise BadRowError("the chat template has no place for reasoning, found a reply with it")


def _missing(names: Sequence[str], text: str, start: int, end: int) -> str | None:
    """The first of some names that a stretch of text does not hold; each is looked for behind the
    one before first."""
    position = start
    for name in names:
        found = text.find(name, position, end)
        if found < 0 and (found := text.find(name, start, end)) < 0:
            return name
        position = found
    return None


def encode_prompts(
    prompts: Sequence[Conversation | Sequence[Message]], encoder: ChatEncoder
) -> list[list[int]]:
    """Conversations that end with a question -> the ids that an answer follows.

    Raises:
        UserError: the template cannot render one.
    """
    conversations = [p if isinstance(p, Conversation) else Conversation(list(p)) for p in prompts]
    results = encoder.encode(conversations, prompt=True)
    for number, result in enumerate(results, 1):
        if isinstance(result, BadRowError):
            raise UserError(f"prompt {number}: {result}.")
    return [result.ids for result in results]
