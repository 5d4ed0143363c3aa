"""Texts that tokenizers are trained and tested on here."""

from hypothesis import strategies as st

from data_pipeline.tokenization import END_OF_TEXT

TEXTS = [
    "the quick brown fox jumps over the lazy dog while the other foxes were watching the dog sleep",
    "def function(argument):\n    return argument + other_argument\n",
    "naïve café Größe 東京 🙂 " * 4,
    "a text a token a layer and some  double  spaces,\ttabs\tand\n\nnewlines in 1234 lines 5678",
    "gradients flow back through every layer of the network and the optimizer takes a step against them",
    "whoever measures before changing anything learns where the time goes; whoever guesses learns something else",
    "return [number for number in range(100) if number % 2 == 0 and number not in (4, 8, 16, 32)]\n",
] * 3

_CONTROL = [END_OF_TEXT, "<s>", "</s>", "<unk>", "<0x41>", "<|", "|>"]
_DIFFICULT = [
    "\n",
    "\r\n",
    "  ",
    "\t",
    "the ",
    "e\u0301",
    "한국어",
    "don't",
    "123",
    "🙂",
    "👩\u200d👩\u200d👧",
    "\0",
    "==",
    " dog",
]
_FAMILIAR = ["ther", "ing", " whoever", "number", " every step", "function(argument)", "e", "r", "th", "n", " o", "a"]

ANY_TEXT = st.lists(
    st.sampled_from((*_CONTROL, *_DIFFICULT, *_FAMILIAR)) | st.text(max_size=12),
    max_size=12,
).map("".join)
"""Valid Unicode (no lone surrogates), with control tokens spelled out."""
