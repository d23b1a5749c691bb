"""Texts that tokenizers lose: each must come back from its token ids as it went in."""

PROBES: dict[str, tuple[str, ...]] = {
    "emoji": (
        "😀🏽 👍🏿 ❤️ ☺︎ ✈",
        "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🧑‍🤝‍🧑",  # joined by zero-width joiners
        "🇨🇳🇺🇸🏴󠁧󠁢󠁥󠁮󠁧󠁿",  # flags: pairs of regional indicators, and a tag sequence
        "1️⃣ #️⃣ *️⃣",
    ),
    "rare Chinese": (
        "㐀㐁㒵䶵",  # extension A
        "𠀀𠮷𪚥𪛖",  # B
        "𪜀𫜴 𫝀𫠝 𫠠𬺡",  # C, D, E
        "𬺰𮯠 𰀀𱍊 𱍐𲎯",  # F, G, H
        "龘靐齉爩 〇々 﨑 ⼀⺀",  # radicals and compatibility forms
    ),
    "mixed scripts": (
        "Hello世界，Привет мир！مرحبا नमस्ते สวัสดี 안녕 こんにちは γειά שלום",
        "用Python写code：print('你好')，好吗?",
        "ＦＵＬＬ　ｗｉｄｔｈ！１２３，half-width",
        "Ǆ ǅ ǆ ß ẞ İ ı ﬁ ſ K Å",
    ),
    "white space": (
        " ",
        "  leading, inner   and trailing   ",
        "\ttab\t\ttabs \t mixed \t",
        "　全角　空格　　",
        "\u00a0no-break\u2003em\u2009thin\u200bzero\u202fnarrow\u2028line\u2029paragraph\u0085next",
        " \n  \n\n   \n\n\n",
    ),
    "line ends": (
        "unix\nunix\n\n",
        "dos\r\ndos\r\n\r\n",
        "mac\rmac\r\r",
        "\r\n \n\r \r\n",
        "中文。\r\n\r\n第二段\n",
    ),
    "numbers": (
        "0 7 42 1984 31415926535 1,234,567.89 -1e-10 3.14 50% №5 ½",
        "2024-02-30 23:59:60 +86 138-0000-0000 0xFF 1_000",
        "一二三四五 壹贰叁 ①② Ⅷ ٣٤٥ १२३ １２３",
    ),
    "code": (
        'def f(x: int) -> str:\n    """Doc."""\n\treturn f"{x!r:>8}" if x != 0 else \'\\n\'\n',
        "for (int i = 0; i < n; ++i) { a[i] += b->c; } // 注释\r\n",
        (
            '{"键": [1, 2.5e3, null, "\\u4f60"]}\n<div class="a">&nbsp;</div>\n$\\frac{a}{b} \\leq'
            " \\infty$"
        ),
        "SELECT * FROM `t` WHERE a<>'b'; -- ==> && || ??= ... ~~~ ``` #### ____ ----",
    ),
    "combining marks": (
        "e\u0301 n\u0303 a\u0308\u0304",
        "Z͑͗a̴͠l̷̆g̶̈o̵",
        "क्षि ก็้ 각",
        "é é",
        "\u0301alone",
    ),
    "right to left": (
        "السلام عليكم، كيف حالك؟",
        "שָׁלוֹם עולם",
        "abc \u202eright\u202c \u2067עב\u2069 123 \u200fend\u200e",
    ),
    "control characters": (
        "a\x00b",
        "\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\x9f",
        "\ufeffbom \ufffd \uffff \U0010ffff",
        "\x00",
    ),
    "control tokens as text": (
        "<|endoftext|>",
        "<|im_start|>system\nYou are free.<|im_end|>\n",
        "a<|im_end|>b <|im_start|>",
        "<s>[INST] hi [/INST]</s> <unk> <pad> [CLS] [SEP] [MASK] <bos> <eos> <0x0A> ▁ Ġ Ċ ##ing",
        "<think>\n\n</think> <tool_call>{}</tool_call> <tool_response></tool_response>",
    ),
}
