"""The embedded corpus: a small closed world in English and Chinese, generated from a seed, without
a download.

Twenty-four invented people, each with a town, a job, a pet, a food, a colour and an instrument.
Every fact is in the pretraining documents, many times and in many forms, in both languages. For a
fifth of the facts (the held-out ones) no training row of any stage ever asks a question, in any
wording or language: neither in a conversation, nor in a preference pair, nor in prose.

What it shows: facts memorised from documents become answerable in another form (a conversation, a
letter), and a preference can be changed without losing them. What it does not show: general
knowledge or reasoning; about a stranger, the model makes something up. (Sums were tried and left
out: the model did not learn them in the time available.) The held-out documents are new
arrangements of known facts, so their bits per byte measure memory and form; a part of the Python
language reference (`pydoc_data.topics`) is added as real English, the only text not invented here.
It differs between Python versions: equal rows need an equal seed and an equal Python minor version.

Splits (name -> rows):
    pretrain, pretrain_eval   {"text": str}
    sft, lora                 {"conversations": [{"role": str, "content": str}, ...]}
    sft_eval, lora_eval       the same, the last message is the reference, plus "language"
                              ("en" | "zh") and "kind"
    dpo, dpo_eval             {"prompt": [messages], "chosen": [message], "rejected": [message]}

Kinds: "fact" (a held-out question in a trained wording), "wording" (held-out question and held-out
wording), "turns" (a held-out question as the second question of a conversation), "letter" (the
skill that LoRA adds).
"""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

from minimind.common.files import write_text
from minimind.data.world_sentences import (
    ATTRIBUTES,
    COURTESY,
    JOINT,
    LANGUAGES,
    LETTER,
    LETTER_ASK,
    PEOPLE,
    SMALL_TALK,
    STORY,
    SYSTEM,
)

Fact = tuple[str, str]  # (person, attribute): what a question is about
Turn = tuple[str, str]  # (question, answer)

KINDS = ("fact", "wording", "turns", "letter")
DOCUMENTS, HELD_OUT_DOCUMENTS = 9000, 300
SHAPES = {"portrait": 34, "list": 13, "table": 14, "questions": 33, "story": 6}  # and their shares
REFERENCE_TOPICS = ("assert", "break", "continue", "del", "for", "global", "if", "import", "lambda",
                    "pass", "raise", "return", "try", "while", "with", "yield")  # fmt: skip


def write_world(directory: Path, seed: int = 0) -> dict[str, Path]:
    """Write every split as `<directory>/<name>.jsonl`; returns {name: path}.

    A file that is already right is left alone.

    Raises:
        OSError: a file cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in build_world(seed).items():
        paths[name] = directory / f"{name}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not paths[name].is_file() or paths[name].read_bytes() != text.encode():
            write_text(paths[name], text)
    return paths


def build_world(seed: int = 0) -> dict[str, list[dict]]:
    """All splits of the world as {name: rows}; the module's docstring lists names and formats."""
    valley = _Valley(seed)
    documents = list(dict.fromkeys(valley.document() for _ in range(DOCUMENTS)))
    reference = _reference()
    training = [text for number, text in enumerate(reference) if number % 10]
    world = {
        "pretrain": documents[HELD_OUT_DOCUMENTS:] + training,
        "pretrain_eval": documents[:HELD_OUT_DOCUMENTS] + reference[::10],
    }
    world = {name: [{"text": text} for text in texts] for name, texts in world.items()}
    world["sft"] = [{"conversations": messages} for messages in valley.chats()]

    world |= {"sft_eval": [], "lora": [], "lora_eval": [], "dpo": [], "dpo_eval": []}
    for language in LANGUAGES:
        for fact in sorted(valley.held_out):
            turn = valley.turn(fact, language)
            kinds = {
                "fact": [turn],
                "wording": [valley.turn(fact, language, new_wording=True)],
                "turns": [valley.some_turn(language), valley.turn(fact, language)],
            }
            letter = valley.conversation([valley.letter(fact, language)], language, system=0.0)
            labels = {"language": language, "kind": "letter"}
            world["lora_eval"].append({"conversations": letter, **labels})
            for kind, turns in kinds.items():
                messages = valley.conversation(turns, language, system=0.0)
                labels = {"language": language, "kind": kind}
                world["sft_eval"].append({"conversations": messages, **labels})
            world["dpo_eval"].append(valley.pair(turn, language))
        for fact in valley.asked:
            world["dpo"].append(valley.pair(valley.turn(fact, language), language))
            for _ in range(2):
                messages = valley.conversation([valley.letter(fact, language)], language)
                world["lora"].append({"conversations": messages})

    # As many plain conversations keep the adapter from signing every answer and from forgetting
    # (half was too few)
    world["lora"] += valley.rng.sample(world["sft"], len(world["lora"]))
    for name in ("pretrain", "sft", "lora", "dpo"):
        valley.rng.shuffle(world[name])
    return world


class _Valley:
    """The facts of one seed, their values in (English, Chinese), and texts about them."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.facts: dict[Fact, tuple[str, str]] = {}
        self.held_out: set[Fact] = set()  # a fifth of the facts
        for attribute, table in ATTRIBUTES.items():
            # Every value belongs to equally many people, so that guessing the most frequent value
            # earns nothing
            people, values = self.rng.sample(PEOPLE, len(PEOPLE)), table["values"]
            for index, person in enumerate(people):
                self.facts[person, attribute] = values[index % len(values)]
            strangers = self.rng.sample(people, round(len(PEOPLE) / 5))
            self.held_out |= {(person, attribute) for person in strangers}
        self.asked = [fact for fact in self.facts if fact not in self.held_out]

    # Sentences

    def fill(self, template: str, fact: Fact, language: str) -> str:
        """One sentence about a fact from a template."""
        person, attribute = fact
        value = self.facts[fact][LANGUAGES.index(language)]
        return template.format(n=person, v=value, k=ATTRIBUTES[attribute]["name"][language])

    def statement(self, fact: Fact, language: str) -> str:
        """A sentence that tells a fact, most often the form of the answers."""
        templates = ATTRIBUTES[fact[1]]["tell"][language]
        return self.fill(self.rng.choices(templates, [2, 1, 1])[0], fact, language)

    def turn(self, fact: Fact, language: str, new_wording: bool = False) -> Turn:
        """A question about a fact, in the held-out wording or one of the others, and its answer."""
        asks, tells = (ATTRIBUTES[fact[1]][key][language] for key in ("ask", "tell"))
        question = asks[-1] if new_wording else self.rng.choice(asks[:-1])
        return self.fill(question, fact, language), self.fill(tells[0], fact, language)

    def some_turn(self, language: str) -> Turn:
        """A turn about any fact that is not held out."""
        return self.turn(self.rng.choice(self.asked), language)

    def letter(self, fact: Fact, language: str) -> Turn:
        """A turn whose answer is signed like a letter."""
        question, answer = self.turn(fact, language)
        ask = self.rng.choice(LETTER_ASK[language])
        return ask.format(q=question), LETTER[language].format(a=answer)

    # Rows

    def document(self) -> str:
        """One pretraining document in one language, in one of SHAPES."""
        rng = self.rng
        language = rng.choice(LANGUAGES)
        (shape,) = rng.choices(list(SHAPES), list(SHAPES.values()))
        person, attribute = rng.choice(PEOPLE), rng.choice(list(ATTRIBUTES))
        about = [(person, each) for each in rng.sample(list(ATTRIBUTES), rng.randint(3, 6))]
        if shape == "table":  # such as "town | Lena | Velo": facts must not depend on sentences
            rows = about[: rng.randint(1, 4)]
            return "\n".join(self.fill("{k} | {n} | {v}", fact, language) for fact in rows)
        if shape == "questions":
            turns = [
                self.turn(fact, language) for fact in rng.sample(self.asked, rng.randint(2, 4))
            ]
            # A transcript: the roles are ordinary words, so pretraining sees no control token
            if rng.random() < 0.5:
                return "\n".join(f"user\n{ask}\nassistant\n{answer}" for ask, answer in turns)
            sentences = [question + JOINT[language] + answer for question, answer in turns]
        elif shape == "list":
            people = rng.sample(PEOPLE, rng.randint(3, 6))
            sentences = [self.statement((each, attribute), language) for each in people]
        else:
            sentences = [self.statement(fact, language) for fact in about]
        if shape == "story":
            opening, closing = STORY[language]
            sentences = [rng.choice(opening), *sentences[:3], rng.choice(closing)]
        # Sentences may also begin a line, as answers do: a name there is another token than after a
        # space
        return rng.choice([JOINT[language], "\n"]).join(sentences)

    def conversation(
        self, turns: list[Turn], language: str, courtesy: float = 0.0, system: float = 0.2
    ) -> list[dict[str, str]]:
        """The messages of turns; `courtesy` and `system` are the shares that get one."""
        messages = []
        if self.rng.random() < system:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEM[language])})
        for question, answer in turns:
            if self.rng.random() < courtesy:
                answer += JOINT[language] + COURTESY[language]
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def chats(self) -> list[list[dict[str, str]]]:
        """The conversations of SFT: questions about facts, some with a second turn; small talk."""
        chats = []
        for language in LANGUAGES:
            for fact in self.asked:
                for _ in range(4):
                    turns = [self.turn(fact, language)]
                    if self.rng.random() < 0.3:
                        turns.append(self.some_turn(language))
                    chats.append(self.conversation(turns, language, courtesy=0.25))
            for questions, answer in SMALL_TALK[language]:
                for question in questions * 6:
                    second = self.some_turn(language)
                    turns = [(question, answer), second][: 2 if self.rng.random() < 0.3 else 1]
                    chats.append(self.conversation(turns, language))
        return chats

    def pair(self, turn: Turn, language: str) -> dict[str, list[dict[str, str]]]:
        """A preference pair: an answer with the courtesy (chosen) and without it (rejected)."""
        *prompt, rejected = self.conversation([turn], language)
        chosen = {"role": "assistant", "content": turn[1] + JOINT[language] + COURTESY[language]}
        return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def _reference() -> list[str]:
    """Passages of about 600 characters from the Python language reference, without repeats."""
    passages: list[str] = []
    seen: set[str] = set()
    for topic in REFERENCE_TOPICS:
        passage = ""
        for paragraph in topics.get(topic, "").split("\n\n"):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            passage += paragraph + "\n\n"
            if len(passage) > 600:
                passages.append(passage.strip())
                passage = ""
    return passages


# Judging replies


def is_embedded(row: dict) -> bool:
    """Whether the fields of a conversation mark it as a held-out row of this corpus."""
    return row.get("language") in LANGUAGES and row.get("kind") in KINDS


def strip_courtesy(text: str) -> str:
    """The reply without the courtesy of either language, stripped."""
    text = text.strip()
    for courtesy in COURTESY.values():
        text = text.removesuffix(courtesy).strip()
    return text


def is_courteous(text: str, language: str) -> bool:
    """Whether the reply says something, then ends with the courtesy of its question's language."""
    return text.strip().endswith(COURTESY[language]) and bool(strip_courtesy(text))
