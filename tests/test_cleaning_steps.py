"""Each cleaning step on hand-written text: what it must change, and what it must leave alone."""

import random
import time
from dataclasses import asdict

import pytest
from cleaning_corpus import CHINESE, ENGLISH, POEM, STATUTE

from minimind.cleaning.duplicates import Decontaminate, ExactDedup, NearDedup
from minimind.cleaning.filters import Language, Length, Quality, detect_language
from minimind.cleaning.normalization import ControlCharacters, FixUnicode, RemoveMarkup, Whitespace
from minimind.cleaning.personal import MaskPersonalData, is_card_number, is_id_number
from minimind.common.errors import UserError

CLASSICAL = (
    "子曰：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？"
    "有子曰：其为人也孝弟，而好犯上者，鲜矣。"
)
CODE = (
    "The function returns a list of pairs:\n\n```python\ndef pairs(xs: List[int]) -> Dict[str,"
    " int]:\n    if a < b and c > d:\n        return {x: x & 0xFF for x in xs}  #   why\n```\n\nUse"
    " `vector<int>` or List<String>."
)
EMOJI = "好的👍🏽，一家人👨‍👩‍👧‍👦去旅游🏴󠁧󠁢󠁥󠁮󠁧󠁿，❤️ and “quotes” — it’s ﬁne……"
GOOD = [CHINESE, ENGLISH, CLASSICAL, POEM, STATUTE, CODE, EMOJI]


@pytest.mark.parametrize(
    "step", [FixUnicode(), RemoveMarkup(), ControlCharacters(), MaskPersonalData()]
)
@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_good_text_passes_unchanged(step, text):
    assert step(text) == text


@pytest.mark.parametrize("text", GOOD[:-1], ids=range(len(GOOD) - 1))
def test_good_text_is_kept_by_the_filters(text):
    assert [step.reason(text) for step in (Length(), Language(), Quality())] == [None] * 3


# Unicode and characters


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("cafÃ© au lait", "café au lait"),
        ("truthsâ\x80\x94that all", "truths—that all"),
        ("å¤§å®¶å¥½ï¼Œæ¬¢è¿Ž", "大家好，欢迎"),
        ("e\u0301", "é"),
        ("\x1b[31mred\x1b[0m", "red"),
    ],
)
def test_broken_characters_are_mended(broken, mended):
    assert FixUnicode()(broken) == mended


@pytest.mark.parametrize(
    "text",
    [
        "，。！？；：（）【】《》“”‘’……——、·～",
        "ＡＢＣ１２３ｱｲｳ　％",
        "𠮷野家 㐂 〇",
        "½ ① Ⅳ ㎏ ™",
        "ﬁ ß ſ",
    ],
)
def test_full_width_forms_punctuation_and_rare_characters_are_left_alone(text):
    assert FixUnicode()(text) == text


def test_control_characters_go_and_joiners_of_emoji_stay():
    dirty = "a\x00b\x07\u200bc\ufeffd\u202ee\u2066\tf\r\ng\u2028h\U000e0041i\xadj\ufffek"
    assert ControlCharacters()(dirty) == "abcde\tf\ng\nhijk"
    assert ControlCharacters()(EMOJI) == EMOJI


def test_whitespace_is_tidied_and_code_keeps_its_indent():
    assert (
        Whitespace()("\u3000\u3000第一段\u00a0 有  空格 \t\n\n\n\n第二段 \n")
        == "第一段 有 空格\n\n第二段"
    )
    assert Whitespace()("a\tb\n  c  d\n\u3000e") == "a\tb\n  c d\ne"
    assert Whitespace(max_blank_lines=0)("a\n\n\nb") == "a\nb"
    assert Whitespace()("    def f():\n        return  1") == "    def f():\n        return 1"
    assert Whitespace()(CODE) == CODE


# Markup


@pytest.mark.parametrize(
    ("html", "plain"),
    [
        ("<p>one</p><p>two &amp; three</p>", "\none\n\ntwo & three\n"),
        ("see <a href=\"http://x.y/?a=1&b=2\" class='c'>this</a>", "see this"),
        ("a<br>b<BR/>c<br />d", "a\nb\nc\nd"),
        ("<SCRIPT type=x>if (a < b) { alert('</b>') }</script >x<style>p {}</style>", "x"),
        ("a<!-- <p>hidden</p> -->b", "ab"),
        ("<!DOCTYPE html><html><body>text</body></html>", "\n\ntext\n\n"),
        ('水<sub>2</sub>是<b>重要</b>的。<ref name=a>书</ref><ref name="b" />', "水2是重要的。"),
        ("<td>1</td><td>2</td>", " 1  2 "),
        ("&#20013;&#x6587; &eacute;&nbsp;x &unknown; &lt;b&gt;", "中文 é\xa0x &unknown; <b>"),
        ("text</div>\n</div>", "text\n\n\n"),
    ],
)
def test_html_is_removed(html, plain):
    assert RemoveMarkup()(html) == plain


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: x <<= 1",
        "List<int> a; Map<String, List<Integer>> b; std::vector<T>& c",
        "git checkout <branch>; usage: cp <source> <dest>",
        "1 <2> 3 <- 4 <= 5 <> 6 <3",
        "用 <div> 包住内容",
        "像 <img> 这样的标签",
        "文字用 <Link to={x}>链接</Link> 组件",
        "在 HTML 中使用标记 <font size=1>",
        "the header cells (<th>) of a table",
        "处理 '&gt;' 和 \"<!--\" 开头的注释 '-->'",
        "`<b>code</b>` and `&amp;`\n```html\n<script>x</script><p>y</p>\n```\nend",
        "R&D; AT&T; a&b;c ?a=1&copy=2",
        "a[[0, 1]], [[x, y], [z]] and {{ name | upper }} and '''doc'''",
        "if [[ -f x ]]; then y == z",
        "<|im_start|>",
    ],
)
def test_code_and_text_about_markup_survive(text):
    assert RemoveMarkup()(text) == text


@pytest.mark.parametrize(
    ("wiki", "plain"),
    [
        (
            "== 历史 ==\n'''北京'''是[[中国|中华人民共和国]]的[[首都]]。{{cite|a{{b}}}}",
            "历史\n北京是中华人民共和国的首都。",
        ),
        ("[[File:a.jpg|thumb|a [[map]] of it]]text [[A|b]]", "text b"),
        ("历史[编辑]\n事实[来源请求]", "历史\n事实"),
        (
            '![logo](a.png) see [the docs](https://x.y/z "t") or [b](#c), f[i](x)',
            " see the docs or b, f[i](x)",
        ),
    ],
)
def test_wiki_and_markdown_leftovers_become_text(wiki, plain):
    assert RemoveMarkup()(wiki) == plain


def test_each_kind_of_markup_can_be_left_in():
    text = "<b>x</b> &amp; [[A|b]] [c](http://d)"
    assert RemoveMarkup(html=False, entities=False, wiki=False, markdown=False)(text) == text
    assert RemoveMarkup(html=False, wiki=False)(text) == "<b>x</b> & [[A|b]] c"


@pytest.mark.parametrize(
    "piece",
    [
        "<script>",
        '<a b="',
        "<a ",
        "<!--",
        "&#1",
        "`",
        "```\n",
        "[[a|",
        "[a](",
        "{{",
        " ",
        "\u3000",
        "==a",
        "<p><",
        "1 ",
        "1.",
        "a@",
        "[[file:",
        "![",
        "😀",
        "\n\n",
        "(0",
    ],
)
def test_time_is_linear_in_the_length_of_hostile_text(piece):
    def cost(length):
        text = (piece * length)[:length] + "x"
        started = time.process_time()
        for step in (
            FixUnicode(),
            RemoveMarkup(),
            ControlCharacters(),
            Whitespace(),
            MaskPersonalData(),
        ):
            step(text)
        for step in (Language(), Quality()):
            step.reason(text)
        return time.process_time() - started

    # Eight times the text: 8 if linear, 64 if quadratic. Tried again, since what else runs takes
    # from the caches.
    assert any(cost(200_000) < 24 * cost(25_000) for _ in range(3))


# Personal data


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("写信给 li.ming+news@mail.qq.com。", "写信给 [EMAIL]。"),
        ("邮箱：a_b@x-y.com.cn，", "邮箱：[EMAIL]，"),
        ("电话13812345678，", "电话[PHONE]，"),
        ("+86 138-1234-5678 或 138 1234 5678", "[PHONE] 或 [PHONE]"),
        ("总机010-62345678转801，(0571)8765 4321", "总机[PHONE]，[PHONE]"),
        ("call (212) 555-0123 or 1-650-555-0199.", "call [PHONE] or [PHONE]."),
        ("tel: +44 20 7946 0958, +49 (30) 901820", "tel: [PHONE], [PHONE]"),
        ("身份证11010519491231002X。", "身份证[ID_NUMBER]。"),
        # Too few different digits: a placeholder
        ("卡号 4111 1111 1111 1111 到期", "卡号 4111 1111 1111 1111 到期"),
        ("卡号 4539 1488 0343 6467 到期, 6222021234567894", "卡号 [BANK_CARD] 到期, [BANK_CARD]"),
        ('<tool_call>{"n": 13812345678}</tool_call>', '<tool_call>{"n": "[PHONE]"}</tool_call>'),
        ("from 123.45.67.89:8080", "from [IP_ADDRESS]:8080"),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert MaskPersonalData()(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com, root@localhost, @decorator, a@b",
        "2024-01-15 12:30:45.123456, 20240115123045, 1700000000000",
        "ISBN 978-7-111-12345-6, ISBN 0-306-40615-2, ISSN 0028-0836",
        "根据《刑法》第二百三十二条第1款，法释〔2003〕16号，国务院令第393号",
        "圆周率3.14159265358979，人口1411778724人，13812345678901234567",
        "编号110105194912310021（校验位不对），订单号 4539148803436468",
        (
            "127.0.0.1, 192.168.1.2, 10.0.0.1, 0.0.0.0, 255.255.255.0, 1.2.3.4, 版本 91.10.44.12,"
            " v10.11.12.13, 300.1.1.1"
        ),
        "1-800-FLOWERS, 400-820-8820, 10086, 110, 95588",
        "x = y + 12345678901; a+13812345678; 1 +22 333 444 555",
        "3.10.12 >=2.0.1.post1 0x13812345678 uuid 123e4567-e89b-12d3-a456-426614174000",
        "472547338\n+960397912423686\n",
        "100-200-300, 第 021-2003 号, 比分 21-15 21-18",
        "https://x.y/13812345678?id=13912345678&t=4539148803436467",
    ],
)
def test_ordinary_numbers_are_not_personal_data(text):
    assert MaskPersonalData()(text) == text


def test_check_digits_agree_with_arithmetic_by_hand():
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]  # the table printed in GB 11643
    for seed in range(50):
        body = f"110105{1950 + seed:04d}0601{random.Random(seed).randrange(1000):03d}"
        digit = "10X98765432"[sum(w * int(d) for w, d in zip(weights, body, strict=True)) % 11]
        assert [is_id_number(body + other) for other in "0123456789X"].count(True) == 1
        assert is_id_number(body + digit)
    assert not is_id_number("110105194913310020")  # a month 13
    assert is_card_number("4539148803436467")
    assert not any(is_card_number(f"453914880343646{digit}") for digit in "012345689")


def test_only_the_kinds_asked_for_are_masked():
    assert MaskPersonalData(kinds=["phone"])("a@b.com 13812345678") == "a@b.com [PHONE]"


# Filters


def test_length_counts_characters_and_bytes():
    assert Length(min_chars=3, max_chars=5).reason("好好") == "fewer than 3 chars"
    assert Length(min_chars=3, max_chars=5).reason("好好好好好好") == "more than 5 chars"
    assert Length(min_chars=None, min_bytes=7).reason("好好") == "fewer than 7 bytes"
    assert Length(min_chars=None, max_bytes=5).reason("好好") == "more than 5 bytes"
    assert Length(min_chars=None, max_chars=None).reason("") is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("これは日本語の文章です。今日はとても天気がいいので、公園へ散歩に行きました。", "ja"),
        ("오늘은 날씨가 매우 좋아서 공원에 산책을 갔습니다. 꽃이 많이 피어 있었습니다.", "ko"),
        ("Сегодня была очень хорошая погода, и мы пошли гулять в парк всей семьёй.", "ru"),
        (
            (
                "Gestern war das Wetter sehr schön, und wir sind mit der ganzen Familie spazieren"
                " gegangen."
            ),
            "de",
        ),
    ],
)
def test_other_languages_are_removed_and_can_be_kept(text, language):
    assert Language().reason(text) == f"language {language}"
    assert Language(keep=["zh", language]).reason(text) is None


def test_language_of_chinese_texts_is_told_by_the_script():
    assert [detect_language(text) for text in (CHINESE, CLASSICAL, POEM, STATUTE)] == [
        ("zh", 1.0)
    ] * 4
    assert detect_language(ENGLISH)[0] == "en"
    assert detect_language("12345 !!!") == ("unknown", 0.0)


DISHES = (
    "鱼香肉丝 宫保鸡丁 麻婆豆腐 红烧狮子头 糖醋里脊 水煮牛肉 干煸豆角 清蒸鲈鱼 蒜蓉西兰花"
    " 酸辣土豆丝 葱爆羊肉 "
    "京酱肉丝 木须肉 佛跳墙 叫花鸡 东坡肉 梅菜扣肉 粉蒸排骨 口水鸡 夫妻肺片 毛血旺 回锅肉 地三鲜"
    " 锅包肉 "
    "溜肥肠 爆炒腰花 白切鸡 烧鹅 叉烧"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("买买买优惠" * 40, "one 2-gram repeated"),
        ("buy cheap watches now " * 30, "one 2-gram repeated"),
        ("★☆▓▒░█▄▀■□" * 20 + CHINESE, "symbols"),
        ("2023 114 5567 88.2 99.1 3321 445 90 12 " * 8, "digits"),
        (ENGLISH + "\ufffd\ufffd", "lost characters"),
        ("\n".join(f"- menu item {n}" for n in range(20)), "bullet lines"),
        (
            "\n".join(f"This is teaser number {n} of the page..." for n in range(20)),
            "lines that end in an ellipsis",
        ),
        ("\n".join(["点击这里查看更多精彩内容", f"{CHINESE[:30]}"] * 8), "duplicate lines"),
        (" ".join(f"keyword{n} stuffing{n} page{n}" for n in range(40)), "no stop words"),
        (DISHES, "no function characters"),
        (CHINESE * 4, "repeated 10-grams"),
    ],
)
def test_junk_is_removed_for_its_reason(text, reason):
    assert Quality().reason(text) == reason
    assert Quality(**dict.fromkeys(RULES)).reason(text) is None


RULES = [name for name in asdict(Quality()) if name not in ("min_units", "min_lines")]


# Duplicates


def kept(step, texts):
    index = step.index()
    return [
        text
        for number, text in enumerate(texts)
        if index.find_or_add(step.key(text), number) is None
    ]


def test_exact_copies_differ_in_case_and_whitespace_at_most():
    texts = ["a  B\nc", "A b c ", "1+1", "1-1", "11", "你好。", "你好", "e\u0301", "é"]
    assert kept(ExactDedup(), texts) == ["a  B\nc", "1+1", "1-1", "11", "你好。", "你好", "e\u0301"]


def jaccard(a, b, n=5):
    def shingles(text):
        reduced = "".join(
            character for character in text.casefold() if character.isalnum() or character == "_"
        )
        return {reduced[i : i + n] for i in range(max(len(reduced) - n, 0) + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_near_copies_are_those_of_a_true_jaccard_similarity_around_the_threshold():
    """Against the exact similarity, computed here from the sets: copies are found, others never."""
    rng = random.Random(0)
    alphabet = [chr(0x4E00 + n) for n in range(3000)]
    wrong = 0
    for _ in range(60):
        original = rng.choices(alphabet, k=300)
        changed = list(original)
        for position in rng.sample(range(300), rng.choice([1, 2, 4, 8, 16, 30])):
            changed[position] = rng.choice(alphabet)
        a, b = "".join(original), "".join(changed)
        similarity = jaccard(a, b)
        removed = len(kept(NearDedup(), [a, b])) == 1
        if similarity > 0.9 or similarity < 0.7:  # 128 values estimate it to about 0.035
            wrong += removed != (similarity > 0.8)
    assert wrong == 0


def test_near_duplicates_keep_the_first_and_are_not_chained():
    a = "".join(chr(0x4E00 + n) for n in range(400))
    near, far = a[:-10] + "变化了的结尾", a[:200] + "".join(chr(0x6000 + n) for n in range(200))
    assert kept(NearDedup(), [a, near, far, near]) == [a, far]
    assert kept(NearDedup(), [near, a]) == [near]
    assert kept(NearDedup(), ["短", "短", "长", ""]) == ["短", "长", ""]


@pytest.mark.parametrize("step", [ExactDedup(), NearDedup()])
def test_an_index_restored_from_disk_goes_on_as_if_never_interrupted(step):
    texts = [CHINESE, ENGLISH, CHINESE.replace("小明", "小红", 1), STATUTE, ENGLISH, POEM, POEM]
    keys = [step.key(text) for text in texts]
    whole = step.index()
    expected = [whole.find_or_add(key, number) for number, key in enumerate(keys)]
    for cut in range(len(keys)):
        first, second = step.index(), step.index()
        begun = [first.find_or_add(key, number) for number, key in enumerate(keys[:cut])]
        second.restore(first.take_new())
        rest = [second.find_or_add(key, number) for number, key in enumerate(keys[cut:], cut)]
        assert begun + rest == expected


def test_rows_that_hold_an_ngram_of_an_evaluation_set_are_removed(write_jsonl):
    question = (
        "If a train leaves the station at noon and travels for three hours at sixty miles an hour,"
        " how far is it?"
    )
    chinese = (
        "一个水池有两个进水管和一个出水管，单开甲管六小时可以注满全池，问同时打开需要多少小时？"
    )
    short = {
        "question": "What is the capital of France?",
        "choices": ["Paris", "Rome"],
        "answer": "巴黎是法国的首都城市之一吗",
    }
    path = write_jsonl(
        "eval.jsonl", [{"question": question}, {"problem": {"text": chinese}}, short]
    )
    step = Decontaminate(against=[path])
    words = question.split()
    assert step.reason(f"Homework: {question.upper()} The answer is 180.") == "in an evaluation set"
    assert step.reason("so, " + " ".join(words[3:16])) == "in an evaluation set"  # 13 words
    assert step.reason("so, " + " ".join(words[3:15])) is None  # 12 words
    assert step.reason("题目：" + chinese[5:30]) == "in an evaluation set"
    assert step.reason("题目：" + chinese[5:20]) is None
    assert (
        step.reason("我问你：巴黎是法国的首都城市之一吗？") == "in an evaluation set"
    )  # 13 characters, as a whole
    assert (
        step.reason("What is the capital of France? Paris, not Rome.") is None
    )  # 6 words: too short to be looked for
    assert [step.reason(text) for text in GOOD] == [None] * len(GOOD)


def test_an_evaluation_set_without_text_to_look_for_is_refused(write_jsonl):
    with pytest.raises(UserError, match="found no text of at least 8 words or 12 Chinese"):
        Decontaminate(against=[write_jsonl("eval.jsonl", [{"answer": "yes"}])]).prepare()
