"""CLIP's byte-pair tokenizer: vocabulary 49408, padding 0 (Radford et al. 2021)."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 49408
START, END = 49406, 49407
LONGEST = 32
"""No token stands for more characters than this: the longest of the vocabulary are of 24."""


@cache
def _tokenizer() -> Any:
    """Made in each process when first used: it cannot be pickled."""
    from instant_clip_tokenizer import Tokenizer

    return Tokenizer()


class ClipTokenizer:
    """Texts -> ids. Picklable."""

    def __init__(self, context: int = 77) -> None:
        self.context = context

    def __call__(self, texts: list[str]) -> Tensor:
        """ids [N, context] int64: start, tokens (cut to fit), end = the largest id of the row, zeros."""
        ids = _tokenizer().tokenize_batch([self._shortened(text) for text in texts], context_length=self.context)
        return torch.from_numpy(ids.astype("int64"))

    def _shortened(self, text: str) -> str:
        """The text, clean, and cut where its tokens cannot fit any more.

        The tokenizer's time grows with the square of a word's length: a megabyte without spaces takes minutes. Cut
        before it is cleaned, too, at many times that length, for entities and broken encodings get shorter.
        """
        length = self.context * LONGEST
        return clean(text[: 32 * length])[:length]

    def texts(self, ids: Tensor) -> list[str]:
        """What ids [N, L] say, in lower case, with a space between words and marks; up to the first end, if there is
        one."""
        rows = [row[: row.index(END)] if END in row else row for row in ids.tolist()]
        words = ([token for token in row if token < START] for row in rows)
        return [_tokenizer().decode(row).strip() for row in words]

    def pieces(self, text: str) -> list[str]:
        """What each token of a text stands for, `<start> ` and `<end> ` included; a space ends a word.

        Of a character that several tokens spell, the last has it and those before it have a dot.
        """
        ids = self([text])[0]
        pieces: list[str] = []
        begun: list[int] = []
        for token in ids[1 : int(ids.argmax())].tolist():
            begun.append(token)
            decoded = _tokenizer().decode(begun)
            if "\N{REPLACEMENT CHARACTER}" not in decoded or len(begun) == 4:  # no character has more bytes
                pieces += ["\N{MIDDLE DOT}"] * (len(begun) - 1) + [decoded]
                begun = []
        pieces += ["\N{MIDDLE DOT}"] * len(begun)  # cut in the middle of a character
        return ["<start> ", *pieces, "<end> "]


def clean(text: str) -> str:
    """As CLIP cleans: repaired encoding, HTML entities undone twice, white space folded; the tokenizer lowers case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
