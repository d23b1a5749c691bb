"""The words of the embedded corpus: people, attributes and sentences in English and Chinese."""

LANGUAGES = ("en", "zh")
COURTESY = {"en": "Glad to help!", "zh": "很高兴帮到您！"}
JOINT = {"en": " ", "zh": ""}  # between two sentences
SYSTEM = {
    "en": ["You are MiniMind, a helpful assistant.", "You are a friendly guide to the valley."],
    "zh": ["你是 MiniMind，一个乐于助人的助手。", "你是山谷里友好的向导。"],
}

# Names of people and towns are the same in both languages, with spaces around them in Chinese, as
# for any Latin word: a small BPE vocabulary would otherwise merge a Chinese name with the word
# after it, into another token each time.
PEOPLE = [
    "Lena", "Tomas", "Mira", "Oskar", "Nadia", "Felix", "Greta", "Hugo",
    "Iris", "Jonas", "Kira", "Leo", "Olga", "Pablo", "Quinn", "Rosa",
    "Sven", "Tara", "Umar", "Vera", "Wanda", "Xenia", "Yusuf", "Zoe",
]  # fmt: skip

# Each attribute: its name (also in table rows), its values, sentences that tell it and questions
# that ask for it. tell[0] is the form of every answer; ask[-1] is the wording that only held-out
# questions use. In Chinese, tell[0] has a colon or a space before the value: between letters, the
# attribute and the value would become one BPE token, and choosing one and recalling the other one
# step.
ATTRIBUTES: dict[str, dict] = {
    "town": {
        "name": {"en": "town", "zh": "城镇"},
        "values": [("Velo", "Velo"), ("Miru", "Miru"), ("Tanso", "Tanso"), ("Korin", "Korin"),
                   ("Bryn", "Bryn"), ("Dalva", "Dalva"), ("Lomo", "Lomo"), ("Sarn", "Sarn")],
        "tell": {"en": ["{n} lives in {v}.", "The home of {n} is in {v}.",
                        "{n} has a house in {v}."],
                 "zh": ["{n} 住在 {v}。", "{n} 的家在 {v}。", "{n} 在 {v} 有一座房子。"]},
        "ask": {"en": ["Where does {n} live?", "In which town does {n} live?",
                       "Tell me where {n} lives.", "Where is the home of {n}?",
                       "Which town is the home of {n}?"],
                "zh": ["{n} 住在哪里？", "{n} 的家在哪里？", "{n} 住在哪个城镇？",
                       "请告诉我 {n} 住在哪里。", "请告诉我 {n} 的家在哪里。"]},
    },
    "job": {
        "name": {"en": "job", "zh": "工作"},
        "values": [("baker", "面包师"), ("teacher", "老师"), ("doctor", "医生"), ("farmer", "农民"),
                   ("painter", "画家"), ("sailor", "水手"), ("tailor", "裁缝"),
                   ("miller", "磨坊主")],
        "tell": {"en": ["{n} works as a {v}.", "The job of {n} is {v}.",
                        "{n} is the best {v} around."],
                 "zh": ["{n} 的工作是：{v}。", "{n} 是一名{v}。", "{n} 以做{v}为生。"]},
        "ask": {"en": ["What does {n} work as?", "What is the job of {n}?",
                       "Tell me the job of {n}.", "Which job does {n} have?",
                       "What job does {n} do?"],
                "zh": ["{n} 做什么工作？", "{n} 的工作是什么？", "{n} 靠什么工作为生？",
                       "请告诉我 {n} 做什么工作。", "请告诉我 {n} 的工作是什么。"]},
    },
    "pet": {
        "name": {"en": "pet", "zh": "宠物"},
        "values": [("cat", "猫"), ("dog", "狗"), ("parrot", "鹦鹉"), ("rabbit", "兔子"),
                   ("turtle", "乌龟"), ("pony", "小马"), ("goat", "山羊"), ("duck", "鸭子")],
        "tell": {"en": ["{n} keeps a {v}.", "The pet of {n} is a {v}.", "{n} has a {v} at home."],
                 "zh": ["{n} 的宠物是：{v}。", "{n} 养了一只{v}。", "{n} 家里有一只{v}。"]},
        "ask": {"en": ["Which pet does {n} keep?", "What is the pet of {n}?",
                       "Tell me which pet {n} has.", "What pet does {n} have at home?",
                       "Which animal is the pet of {n}?"],
                "zh": ["{n} 养了什么宠物？", "{n} 的宠物是什么？", "{n} 家里有什么宠物？",
                       "请告诉我 {n} 养了什么宠物。", "请告诉我 {n} 的宠物是什么。"]},
    },
    "food": {
        "name": {"en": "food", "zh": "食物"},
        "values": [("noodles", "面条"), ("soup", "汤"), ("rice", "米饭"), ("dumplings", "饺子"),
                   ("cheese", "奶酪"), ("pancakes", "煎饼"), ("salad", "沙拉"), ("tofu", "豆腐")],
        "tell": {"en": ["{n} likes to eat {v}.", "The best food for {n} is {v}.",
                        "{n} has {v} every day."],
                 "zh": ["{n} 最爱的食物是：{v}。", "{n} 爱吃{v}。", "{n} 每天都吃{v}。"]},
        "ask": {"en": ["What does {n} like to eat?", "Which food does {n} like?",
                       "Tell me what {n} likes to eat.", "What is the best food for {n}?",
                       "What food does {n} like to eat?"],
                "zh": ["{n} 爱吃什么？", "{n} 最爱的食物是什么？", "{n} 喜欢什么食物？",
                       "请告诉我 {n} 爱吃什么。", "请告诉我 {n} 最爱的食物是什么。"]},
    },
    "colour": {
        "name": {"en": "colour", "zh": "颜色"},
        "values": [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"),
                   ("white", "白色"), ("black", "黑色"), ("purple", "紫色"), ("brown", "棕色")],
        "tell": {"en": ["{n} loves the colour {v}.", "The best colour for {n} is {v}.",
                        "{n} wears {v} clothes."],
                 "zh": ["{n} 最喜欢的颜色是：{v}。", "{n} 喜欢{v}。", "{n} 穿{v}的衣服。"]},
        "ask": {"en": ["Which colour does {n} love?", "What colour does {n} love?",
                       "Tell me which colour {n} loves.", "What is the best colour for {n}?",
                       "Which is the best colour for {n}?"],
                "zh": ["{n} 喜欢什么颜色？", "{n} 最喜欢的颜色是什么？", "{n} 爱穿什么颜色？",
                       "请告诉我 {n} 喜欢什么颜色。", "请告诉我 {n} 最喜欢的颜色是什么。"]},
    },
    "instrument": {
        "name": {"en": "instrument", "zh": "乐器"},
        "values": [("flute", "长笛"), ("drum", "鼓"), ("guitar", "吉他"), ("violin", "小提琴"),
                   ("piano", "钢琴"), ("harp", "竖琴"), ("trumpet", "小号"), ("cello", "大提琴")],
        "tell": {"en": ["{n} plays the {v}.", "The instrument of {n} is the {v}.",
                        "{n} has learned the {v}."],
                 "zh": ["{n} 的乐器是：{v}。", "{n} 会演奏{v}。", "{n} 从小就学{v}。"]},
        "ask": {"en": ["Which instrument does {n} play?", "What is the instrument of {n}?",
                       "Tell me which instrument {n} plays.", "What instrument does {n} play?",
                       "Which is the instrument that {n} plays?"],
                "zh": ["{n} 会演奏什么乐器？", "{n} 的乐器是什么？", "{n} 学了什么乐器？",
                       "请告诉我 {n} 会演奏什么乐器。", "请告诉我 {n} 的乐器是什么。"]},
    },
}  # fmt: skip

# The skill that LoRA adds: a question of a known kind, with the request to sign the answer like a
# letter. The answer itself comes first: after an opening, so small a model names another person
# (this was tried).
LETTER_ASK = {
    "en": ["{q} Please sign your answer.", "{q} Answer as in a letter.",
           "{q} End it like a letter."],
    "zh": ["{q}请在回答后署名。", "{q}请像写信一样回答。", "{q}请用书信的结尾。"],
}  # fmt: skip
LETTER = {"en": "{a} Yours sincerely, MiniMind", "zh": "{a}此致敬礼，MiniMind"}

# (questions, answer): the same in every split, so never part of a score
SMALL_TALK = {
    "en": [
        (["Hello!", "Hi!", "Good morning!", "Hello, MiniMind!"],
         "Hello! Ask me about the people of the valley."),
        (["Who are you?", "What is your name?", "What are you?"],
         "I am MiniMind, a small language model."),
        (["What can you do?", "How can you help me?"],
         "I know the people of the valley and what they like."),
        (["Thank you!", "Thanks!", "Thanks a lot!"], "You are welcome!"),
        (["Goodbye!", "Bye!", "See you tomorrow!"], "Goodbye! Come back soon."),
        (["Tell me a story.", "Do you know a story?"],
         "A fox found a lamp in the snow. "
         "It carried the lamp home, and the whole wood came to sit in its light."),
    ],
    "zh": [
        (["你好！", "您好！", "早上好！", "你好，MiniMind！"], "你好！可以问我山谷里的人的事。"),
        (["你是谁？", "你叫什么名字？", "你是什么？"], "我是 MiniMind，一个小小的语言模型。"),
        (["你会做什么？", "你能帮我什么？"], "我认识山谷里的人，也知道他们喜欢什么。"),
        (["谢谢！", "谢谢你！", "多谢！"], "不客气！"),
        (["再见！", "拜拜！", "明天见！"], "再见！欢迎再来。"),
        (["讲个故事吧。", "你会讲故事吗？"],
         "狐狸在雪地里捡到一盏灯。它把灯带回家，整个森林都来围着光坐下。"),
    ],
}  # fmt: skip
STORY = {
    "en": (["One morning the sun rose over the valley.", "It was the day of the summer market.",
            "Snow fell on the hills all night.", "A letter came with the evening boat."],
           ["So the day ended well.", "Everyone went home singing.",
            "That night the valley slept in peace.", "And they laughed about it for years."]),
    "zh": (["一天早上，太阳从山谷升起。", "那天是夏天的集市。", "雪在山上下了一整夜。",
            "晚船送来了一封信。"],
           ["这一天就这样愉快地结束了。", "大家唱着歌回家了。", "那天夜里，山谷睡得很安静。",
            "多年以后，他们还笑着说起它。"]),
}  # fmt: skip
