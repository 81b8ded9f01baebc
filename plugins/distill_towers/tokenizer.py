"""CLIP's byte-pair tokenizer: vocabulary 49408, padding 0 (Radford et al. 2021)."""

from __future__ import annotations

import html
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 49408


class ClipTokenizer:
    """Texts -> ids. Picklable: the tokenizer itself, which is not, is made in each process when first used."""

    def __init__(self, context: int = 77) -> None:
        self.context = context
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"context": self.context, "_tokenizer": None}

    def __call__(self, texts: list[str]) -> Tensor:
        """ids [N, context] int64: start, tokens (cut to fit), end = the largest id of the row, zeros."""
        if self._tokenizer is None:
            from instant_clip_tokenizer import Tokenizer

            self._tokenizer = Tokenizer()
        ids = self._tokenizer.tokenize_batch([clean(text) for text in texts], context_length=self.context)
        return torch.from_numpy(ids.astype("int64"))


def clean(text: str) -> str:
    """As CLIP cleans: repaired encoding, HTML entities undone twice, white space folded; the tokenizer lowers case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
