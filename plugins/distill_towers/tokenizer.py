"""CLIP's byte-pair tokenizer: vocabulary 49408, padding 0 (Radford et al. 2021)."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 49408


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
        ids = _tokenizer().tokenize_batch([clean(text) for text in texts], context_length=self.context)
        return torch.from_numpy(ids.astype("int64"))

    def pieces(self, text: str) -> list[str]:
        """What each token of a text stands for, `<start> ` and `<end> ` included; a space ends a word.

        Of a character that several tokens spell, the last has it and those before it have a dot.
        """
        ids = self([text])[0]
        pieces: list[str] = []
        begun: list[int] = []
        for token in ids[1 : int(ids.argmax())].tolist():
            begun.append(token)
            found = _tokenizer().decode(begun)
            if "\N{REPLACEMENT CHARACTER}" not in found or len(begun) == 4:  # no character has more bytes
                pieces += ["\N{MIDDLE DOT}"] * (len(begun) - 1) + [found]
                begun = []
        pieces += ["\N{MIDDLE DOT}"] * len(begun)  # cut in the middle of a character
        return ["<start> ", *pieces, "<end> "]


def clean(text: str) -> str:
    """As CLIP cleans: repaired encoding, HTML entities undone twice, white space folded; the tokenizer lowers case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
