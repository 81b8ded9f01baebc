"""The captions of DataCompDR: the web's, and those of a captioner."""

from __future__ import annotations

import json

from distill_core import BadSample, Sample
from distill_vl.caption_readers import CaptionReader


class DataCompDr(CaptionReader):
    """The web's caption in the member `txt`, and in `syn.json` a list `syn_text` of synthetic ones, each whole."""

    name = "datacompdr"
    sentences = ("txt", "syn_text")

    def captions(self, sample: Sample) -> dict[str, list[str]]:
        try:
            web = bytes(sample.get("txt", b"")).decode()
            synthetic = json.loads(bytes(sample.get("syn.json", b'{"syn_text": []}')))["syn_text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f"txt or syn.json cannot be read: {error!r}") from error
        if not isinstance(synthetic, list) or not all(isinstance(text, str) for text in synthetic):
            raise BadSample("syn.json: syn_text is no list of texts")
        return {"txt": [web] if web.strip() else [], "syn_text": [text for text in synthetic if text.strip()]}
