"""The embedded corpus: a small closed world in English and Chinese, generated from a seed, without
a download.

Twenty-four invented people, each with a town, a job, a pet, a food, a colour and an instrument.
Every fact stands in the pretraining documents, many times and in many forms, in both languages. For
a fifth of the facts (the held-out ones) no question is ever asked in any training row of any stage,
in no wording and no language: neither in a conversation, nor in a preference pair, nor in a
question told as prose.

What it shows: facts memorised from documents become answerable in another form (a conversation, a
letter), and a preference can be moved without losing them. What it does not show: general knowledge
or reasoning; asked about a stranger, the model makes something up. (Sums were tried and left out:
they stayed unlearned in the time there is.) The held-out documents are new arrangements of told
facts, so their bits per byte measure memory and form; a slice of the Python language reference
(`pydoc_data.topics`) stands beside them as real English, and is the only text not invented here. It
differs between Python versions: equal rows need an equal seed and an equal Python minor version.

Splits (name -> rows):
    pretrain, pretrain_eval   {"text": str}
    sft, lora                 {"conversations": [{"role": str, "content": str}, ...]}
    sft_eval, lora_eval       the same, the last message is the reference, plus "language" ("en" | "zh") and "kind"
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

Message = dict[str, str]
Fact = tuple[str, str]  # (person, attribute): what a question is about

LANGUAGES = ("en", "zh")
KINDS = ("fact", "wording", "turns", "letter")
COURTESY = {"en": "Glad to help!", "zh": "很高兴帮到您！"}
JOINT = {"en": " ", "zh": ""}  # between two sentences
SYSTEM = {
    "en": ["You are MiniMind, a helpful assistant.", "You are a friendly guide to the valley."],
    "zh": ["你是 MiniMind，一个乐于助人的助手。", "你是山谷里友好的向导。"],
}

# Names of people and towns are the same in both languages and stand between spaces in Chinese, as
# Latin words do there: a small BPE vocabulary would otherwise merge a Chinese name with the word
# after it, another token each time.
PEOPLE = [
    "Lena", "Tomas", "Mira", "Oskar", "Nadia", "Felix", "Greta", "Hugo",
    "Iris", "Jonas", "Kira", "Leo", "Olga", "Pablo", "Quinn", "Rosa",
    "Sven", "Tara", "Umar", "Vera", "Wanda", "Xenia", "Yusuf", "Zoe",
]  # fmt: skip

# Each attribute: its name (also in table rows), its values, sentences that tell it and questions
# that ask for it. tell[0] is the form of every answer; ask[-1] is the wording that only held-out
# questions use. In Chinese, tell[0] puts a colon or a space before the value: letters on both sides
# would become one BPE token, and choosing the attribute and recalling the value one step.
ATTRIBUTES: dict[str, dict] = {
    "town": {
        "name": {"en": "town", "zh": "城镇"},
        "values": [("Velo", "Velo"), ("Miru", "Miru"), ("Tanso", "Tanso"), ("Korin", "Korin"),
                   ("Bryn", "Bryn"), ("Dalva", "Dalva"), ("Lomo", "Lomo"), ("Sarn", "Sarn")],
        "tell": {"en": ["{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}."],
                 "zh": ["{n} 住在 {v}。", "{n} 的家在 {v}。", "{n} 在 {v} 有一座房子。"]},
        "ask": {"en": ["Where does {n} live?", "In which town does {n} live?", "Tell me where {n} lives.",
                       "Where is the home of {n}?", "Which town is the home of {n}?"],
                "zh": ["{n} 住在哪里？", "{n} 的家在哪里？", "{n} 住在哪个城镇？", "请告诉我 {n} 住在哪里。",
                       "请告诉我 {n} 的家在哪里。"]},
    },
    "job": {
        "name": {"en": "job", "zh": "工作"},
        "values": [("baker", "面包师"), ("teacher", "老师"), ("doctor", "医生"), ("farmer", "农民"),
                   ("painter", "画家"), ("sailor", "水手"), ("tailor", "裁缝"), ("miller", "磨坊主")],
        "tell": {"en": ["{n} works as a {v}.", "The job of {n} is {v}.", "{n} is the best {v} around."],
                 "zh": ["{n} 的工作是：{v}。", "{n} 是一名{v}。", "{n} 以做{v}为生。"]},
        "ask": {"en": ["What does {n} work as?", "What is the job of {n}?", "Tell me the job of {n}.",
                       "Which job does {n} have?", "What job does {n} do?"],
                "zh": ["{n} 做什么工作？", "{n} 的工作是什么？", "{n} 靠什么工作为生？", "请告诉我 {n} 做什么工作。",
                       "请告诉我 {n} 的工作是什么。"]},
    },
    "pet": {
        "name": {"en": "pet", "zh": "宠物"},
        "values": [("cat", "猫"), ("dog", "狗"), ("parrot", "鹦鹉"), ("rabbit", "兔子"),
                   ("turtle", "乌龟"), ("pony", "小马"), ("goat", "山羊"), ("duck", "鸭子")],
        "tell": {"en": ["{n} keeps a {v}.", "The pet of {n} is a {v}.", "{n} has a {v} at home."],
                 "zh": ["{n} 的宠物是：{v}。", "{n} 养了一只{v}。", "{n} 家里有一只{v}。"]},
        "ask": {"en": ["Which pet does {n} keep?", "What is the pet of {n}?", "Tell me which pet {n} has.",
                       "What pet does {n} have at home?", "Which animal is the pet of {n}?"],
                "zh": ["{n} 养了什么宠物？", "{n} 的宠物是什么？", "{n} 家里有什么宠物？",
                       "请告诉我 {n} 养了什么宠物。",
                       "请告诉我 {n} 的宠物是什么。"]},
    },
    "food": {
        "name": {"en": "food", "zh": "食物"},
        "values": [("noodles", "面条"), ("soup", "汤"), ("rice", "米饭"), ("dumplings", "饺子"),
                   ("cheese", "奶酪"), ("pancakes", "煎饼"), ("salad", "沙拉"), ("tofu", "豆腐")],
        "tell": {"en": ["{n} likes to eat {v}.", "The best food for {n} is {v}.", "{n} has {v} every day."],
                 "zh": ["{n} 最爱的食物是：{v}。", "{n} 爱吃{v}。", "{n} 每天都吃{v}。"]},
        "ask": {"en": ["What does {n} like to eat?", "Which food does {n} like?", "Tell me what {n} likes to eat.",
                       "What is the best food for {n}?", "What food does {n} like to eat?"],
                "zh": ["{n} 爱吃什么？", "{n} 最爱的食物是什么？", "{n} 喜欢什么食物？", "请告诉我 {n} 爱吃什么。",
                       "请告诉我 {n} 最爱的食物是什么。"]},
    },
    "colour": {
        "name": {"en": "colour", "zh": "颜色"},
        "values": [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"),
                   ("white", "白色"), ("black", "黑色"), ("purple", "紫色"), ("brown", "棕色")],
        "tell": {"en": ["{n} loves the colour {v}.", "The best colour for {n} is {v}.", "{n} wears {v} clothes."],
                 "zh": ["{n} 最喜欢的颜色是：{v}。", "{n} 喜欢{v}。", "{n} 穿{v}的衣服。"]},
        "ask": {"en": ["Which colour does {n} love?", "What colour does {n} love?", "Tell me which colour {n} loves.",
                       "What is the best colour for {n}?", "Which is the best colour for {n}?"],
                "zh": ["{n} 喜欢什么颜色？", "{n} 最喜欢的颜色是什么？", "{n} 爱穿什么颜色？",
                       "请告诉我 {n} 喜欢什么颜色。",
                       "请告诉我 {n} 最喜欢的颜色是什么。"]},
    },
    "instrument": {
        "name": {"en": "instrument", "zh": "乐器"},
        "values": [("flute", "长笛"), ("drum", "鼓"), ("guitar", "吉他"), ("violin", "小提琴"),
                   ("piano", "钢琴"), ("harp", "竖琴"), ("trumpet", "小号"), ("cello", "大提琴")],
        "tell": {"en": ["{n} plays the {v}.", "The instrument of {n} is the {v}.", "{n} has learned the {v}."],
                 "zh": ["{n} 的乐器是：{v}。", "{n} 会演奏{v}。", "{n} 从小就学{v}。"]},
        "ask": {"en": ["Which instrument does {n} play?", "What is the instrument of {n}?",
                       "Tell me which instrument {n} plays.", "What instrument does {n} play?",
                       "Which is the instrument that {n} plays?"],
                "zh": ["{n} 会演奏什么乐器？", "{n} 的乐器是什么？", "{n} 学了什么乐器？",
                       "请告诉我 {n} 会演奏什么乐器。",
                       "请告诉我 {n} 的乐器是什么。"]},
    },
}  # fmt: skip

# The skill that LoRA adds: a question of the known kind with the wish that the answer be signed as
# a letter is. The answer itself comes first: after an opening, a model this small names another
# person (tried).
LETTER_ASK = {
    "en": [
        "{q} Please sign your answer.",
        "{q} Answer as in a letter.",
        "{q} End it like a letter.",
    ],
    "zh": ["{q}请在回答后署名。", "{q}请像写信一样回答。", "{q}请用书信的结尾。"],
}
LETTER = {"en": "{a} Yours sincerely, MiniMind", "zh": "{a}此致敬礼，MiniMind"}

# (questions, answer): asked and answered the same way in every split, so never part of a score
SMALL_TALK = {
    "en": [
        (["Hello!", "Hi!", "Good morning!", "Hello, MiniMind!"], "Hello! Ask me about the people of the valley."),
        (["Who are you?", "What is your name?", "What are you?"], "I am MiniMind, a small language model."),
        (["What can you do?", "How can you help me?"], "I know the people of the valley and what they like."),
        (["Thank you!", "Thanks!", "Thanks a lot!"], "You are welcome!"),
        (["Goodbye!", "Bye!", "See you tomorrow!"], "Goodbye! Come back soon."),
        (["Tell me a story.", "Do you know a story?"],
         "A fox found a lamp in the snow. It carried the lamp home, and the whole wood came to sit in its light."),
    ],
    "zh": [
        (["你好！", "您好！", "早上好！", "你好，MiniMind！"], "你好！可以问我山谷里的人的事。"),
        (["你是谁？", "你叫什么名字？", "你是什么？"], "我是 MiniMind，一个小小的语言模型。"),
        (["你会做什么？", "你能帮我什么？"], "我认识山谷里的人，也知道他们喜欢什么。"),
        (["谢谢！", "谢谢你！", "多谢！"], "不客气！"),
        (["再见！", "拜拜！", "明天见！"], "再见！欢迎再来。"),
        (["讲个故事吧。", "你会讲故事吗？"], "狐狸在雪地里捡到一盏灯。它把灯带回家，整个森林都来围着光坐下。"),
    ],
}  # fmt: skip
STORY = {
    "en": (["One morning the sun rose over the valley.", "It was the day of the summer market.",
            "Snow fell on the hills all night.", "A letter came with the evening boat."],
           ["So the day ended well.", "Everyone went home singing.", "That night the valley slept in peace.",
            "And they laughed about it for years."]),
    "zh": (["一天早上，太阳从山谷升起。", "那天是夏天的集市。", "雪在山上下了一整夜。", "晚船送来了一封信。"],
           ["这一天就这样愉快地结束了。", "大家唱着歌回家了。",
            "那天夜里，山谷睡得很安静。", "多年以后，他们还笑着说起它。"]),
}  # fmt: skip
REFERENCE_TOPICS = ("assert", "break", "continue", "del", "for", "global", "if", "import", "lambda", "pass", "raise",
                    "return", "try", "while", "with", "yield")  # fmt: skip


def is_embedded(row: dict) -> bool:
    """Whether a conversation's fields say that it is a held-out row of this corpus."""
    return row.get("language") in LANGUAGES and row.get("kind") in KINDS


def strip_courtesy(text: str) -> str:
    """The reply without the courtesy sentence of either language and without white space at its
    ends."""
    text = text.strip()
    for courtesy in COURTESY.values():
        text = text.removesuffix(courtesy).strip()
    return text


def is_courteous(text: str, language: str) -> bool:
    """Whether the reply ends with the courtesy sentence of its question's language and says
    something before it."""
    return text.strip().endswith(COURTESY[language]) and bool(strip_courtesy(text))


def _draw_facts(rng: random.Random) -> tuple[dict[Fact, tuple[str, str]], set[Fact]]:
    """All facts as {(person, attribute): value in (English, Chinese)}, and the held-out fifth of
    them."""
    facts, held_out = {}, set()
    for attribute, table in ATTRIBUTES.items():
        # Every value goes to equally many people, so that guessing the commonest value earns
        # nothing.
        people = rng.sample(PEOPLE, len(PEOPLE))
        facts |= {
            (person, attribute): table["values"][i % len(table["values"])]
            for i, person in enumerate(people)
        }
        held_out |= {(person, attribute) for person in rng.sample(people, round(len(PEOPLE) / 5))}
    return facts, held_out


def _fill(template: str, fact: Fact, value: tuple[str, str], language: str) -> str:
    """One sentence about one fact from a `tell`, `ask` or row template."""
    person, attribute = fact
    return template.format(
        n=person, v=value[LANGUAGES.index(language)], k=ATTRIBUTES[attribute]["name"][language]
    )


def _question(
    rng: random.Random, fact: Fact, value: tuple[str, str], language: str, new_wording: bool = False
) -> str:
    """A question about the fact: the held-out wording if asked for, else one of the others."""
    asks = ATTRIBUTES[fact[1]]["ask"][language]
    return _fill(asks[-1] if new_wording else rng.choice(asks[:-1]), fact, value, language)


def _answer(fact: Fact, value: tuple[str, str], language: str) -> str:
    """The one correct answer: the first way to tell the fact."""
    return _fill(ATTRIBUTES[fact[1]]["tell"][language][0], fact, value, language)


def _row(fact: Fact, value: tuple[str, str], language: str) -> str:
    """The fact as a row of a table, for example "town | Lena | Velo"."""
    return _fill("{k} | {n} | {v}", fact, value, language)


def _document(rng: random.Random, facts: dict[Fact, tuple[str, str]], held_out: set[Fact]) -> str:
    """One pretraining document in one language: a portrait, a list, a table, questions in prose or
    a story."""
    language = rng.choice(LANGUAGES)

    def tell(fact: Fact) -> str:
        templates = ATTRIBUTES[fact[1]]["tell"][language]
        return _fill(rng.choices(templates, [2, 1, 1])[0], fact, facts[fact], language)

    kind = rng.choices(["portrait", "list", "table", "questions", "story"], [34, 13, 14, 33, 6])[0]
    person, attribute = rng.choice(PEOPLE), rng.choice(list(ATTRIBUTES))
    about = [(person, a) for a in rng.sample(list(ATTRIBUTES), rng.randint(3, 6))]
    if kind == "table":  # a fact must not hang on one sentence
        return "\n".join(_row(fact, facts[fact], language) for fact in about[: rng.randint(1, 4)])
    if kind == "list":
        sentences = [tell((p, attribute)) for p in rng.sample(PEOPLE, rng.randint(3, 6))]
    elif kind == "questions":
        asked = rng.sample([fact for fact in facts if fact not in held_out], rng.randint(2, 4))
        turns = [
            (_question(rng, fact, facts[fact], language), _answer(fact, facts[fact], language))
            for fact in asked
        ]
        # A transcript: the roles are ordinary words, so pretraining sees no control token
        if rng.random() < 0.5:
            return "\n".join(f"user\n{question}\nassistant\n{answer}" for question, answer in turns)
        sentences = [question + JOINT[language] + answer for question, answer in turns]
    else:
        sentences = [tell(fact) for fact in about]
        if kind == "story":
            opening, closing = STORY[language]
            sentences = [rng.choice(opening), *sentences[:3], rng.choice(closing)]
    # Sentences also stand at the start of a line, as answers do: a name is another token there than
    # after a space.
    return rng.choice([JOINT[language], "\n"]).join(sentences)


def _reference() -> list[str]:
    """Passages of up to about 600 characters from the Python language reference, without
    repeats."""
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


def _conversation(
    rng: random.Random,
    turns: list[tuple[str, str]],
    language: str,
    courtesy: float = 0.0,
    system: float = 0.2,
) -> list[Message]:
    """Messages of question-answer turns; `courtesy` and `system` are the shares that get one."""
    messages = (
        [{"role": "system", "content": rng.choice(SYSTEM[language])}]
        if rng.random() < system
        else []
    )
    for question, answer in turns:
        if rng.random() < courtesy:
            answer += JOINT[language] + COURTESY[language]
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def build_world(seed: int = 0) -> dict[str, list[dict]]:
    """All splits of the world as {name: rows}; the module's docstring lists names and row
    formats."""
    rng = random.Random(seed)
    facts, held_out = _draw_facts(rng)
    asked = [fact for fact in facts if fact not in held_out]

    def turn(fact: Fact, language: str, new_wording: bool = False) -> tuple[str, str]:
        value = facts[fact]
        return _question(rng, fact, value, language, new_wording), _answer(fact, value, language)

    def letter_turn(fact: Fact, language: str) -> tuple[str, str]:
        question, answer = turn(fact, language)
        return rng.choice(LETTER_ASK[language]).format(q=question), LETTER[language].format(
            a=answer
        )

    documents = list(dict.fromkeys(_document(rng, facts, held_out) for _ in range(9000)))
    reference = _reference()
    world: dict[str, list[dict]] = {
        "pretrain": [
            {"text": text}
            for text in documents[300:] + [t for i, t in enumerate(reference) if i % 10]
        ],
        "pretrain_eval": [{"text": text} for text in documents[:300] + reference[::10]],
    }

    sft = []
    for language in LANGUAGES:
        for fact in asked:
            for _ in range(4):
                turns = [turn(fact, language)]
                if rng.random() < 0.3:
                    turns.append(turn(rng.choice(asked), language))
                sft.append(_conversation(rng, turns, language, courtesy=0.25))
        for questions, answer in SMALL_TALK[language]:
            for question in questions * 6:
                turns = [(question, answer)] + [turn(rng.choice(asked), language)] * (
                    rng.random() < 0.3
                )
                sft.append(_conversation(rng, turns, language))
    world["sft"] = [{"conversations": messages} for messages in sft]

    world |= {"sft_eval": [], "lora": [], "lora_eval": [], "dpo": [], "dpo_eval": []}
    for language in LANGUAGES:
        for fact in sorted(held_out):
            single = [turn(fact, language)]
            kinds = {
                "fact": single,
                "wording": [turn(fact, language, new_wording=True)],
                "turns": [turn(rng.choice(asked), language), turn(fact, language)],
            }
            row = {
                "conversations": _conversation(
                    rng, [letter_turn(fact, language)], language, system=0.0
                )
            }
            world["lora_eval"].append(row | {"language": language, "kind": "letter"})
            for kind, turns in kinds.items():
                row = {"conversations": _conversation(rng, turns, language, system=0.0)}
                world["sft_eval"].append(row | {"language": language, "kind": kind})
            world["dpo_eval"].append(_pair(rng, single[0], language))
        for fact in asked:
            world["dpo"].append(_pair(rng, turn(fact, language), language))
            for _ in range(2):
                messages = _conversation(rng, [letter_turn(fact, language)], language)
                world["lora"].append({"conversations": messages})
    # As many plain conversations keep the adapter from signing every answer and from forgetting
    # (half was too few).
    world["lora"] += rng.sample(world["sft"], len(world["lora"]))
    for name in ("pretrain", "sft", "lora", "dpo"):
        rng.shuffle(world[name])
    return world


def _pair(rng: random.Random, turn: tuple[str, str], language: str) -> dict[str, list[Message]]:
    """A preference pair: the same correct answer with the courtesy (chosen) and without it
    (rejected)."""
    *prompt, rejected = _conversation(rng, [turn], language)
    chosen = {"role": "assistant", "content": turn[1] + JOINT[language] + COURTESY[language]}
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def write_world(directory: Path, seed: int = 0) -> dict[str, Path]:
    """Writes every split as `<directory>/<name>.jsonl` and returns {name: path}; a file that is
    right is not touched.

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
