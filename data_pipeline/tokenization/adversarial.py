"""Texts that encoders are known to disagree about: what every fast or converted tokenizer is tested on first."""

ADVERSARIAL_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "a",
    "\0",
    "a\0b\0\0",
    "\r\n\r\n \n\t\t\n",
    "line\r\nline\rline\nline\n\n\n\n  indented\n\ttab\n",
    "    four        eight" + " " * 1000 + "end ",
    " leading and trailing \n ",
    "\u00a0\u3000\u2003\u2028\u2029\u0085\u200b\ufeff x",  # white space of every kind, and what only looks like it
    "don't DON'T we'll I'VE it's 'tis ''s 'S \u2019s",
    "0 1 12 123 1234 12345 3.14 1e-9 ½ ² ٣٤٥ 四五 Ⅷ 0x1F600",
    "!?.,;:-_=+*/\\|<>()[]{}#@$%^&~`\"'" * 3,
    "===" * 400 + "---" * 400 + "..." * 400,
    "e\u0301 \u0301 \u0301\u0301 a\u0308\u0323o\u0303 \u093f\u0915 \u0e33",  # combining marks, alone and in wrong order
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇰🇷🇩🇪 ❤️ ☝🏿 \u200d\ufe0f 🙂🙂",
    "東京都に住む。「こんにちは」ｶﾞ カ゛ 𠮷野家 北京大学",
    "한국어 텍스트 \u1112\u1161\u11ab ㅋㅋㅋ 가" + "각" * 300,
    "مرحبا بالعالم ﷺ שָׁלוֹם नमस्ते สวัสดี ქართული Ωμέγα ß İı ǅ",
    "\u202eright to left\u202c \u0600 \ufffd \uffff \U0010ffff \ue000",
    "<|endoftext|><|im_start|></s><s><unk><pad>[CLS][SEP]<0x41><0x0A>▁▁x ▁ x▁",
    "<|endoftext |> <| endoftext|> < s> </ s>",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\Windows\\x",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # comment\n",
    "aaa aaaa aaaaa abababab aabaabaa " * 20,
    "a" * 10_000,
    "abcdefghij" * 10_000,  # one word of 100 kB
    "\n" * 5000,
    "가" * 3000,
)
