"""Captions that a decoder of the recipe writes, against those of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from distill_core import (
    DataError,
    Decoder,
    EvaluationSet,
    Media,
    Model,
    Needs,
    Picture,
    Plan,
    Score,
    Task,
    TaskConfig,
    gather_objects,
    mean_over_sets,
    raise_on_all_ranks,
    require_extra,
)
from distill_core.tools import sheet, words

Positive = Annotated[int, Field(gt=0)]


class CaptioningConfig(TaskConfig):
    """Options of `captioning`."""

    head: str | None = None
    """The decoder among the recipe's `heads`; null takes the only one."""
    references: str | None = None
    """Field of the sample that holds the captions to compare with; null takes what the modality reads. Each item of it
    is a reference."""
    beams: Positive = 1
    """Continuations that are followed at a time (beam search); 1 takes the likeliest token each time."""
    longest: Positive | None = None
    """Tokens at most, start and end among them; null: as many as the backbone takes."""
    prompt: str | None = None
    """What every caption begins with."""


class Captioning(Task):
    """BLEU (4-grams) and chrF in percent, by sacrebleu, of a caption for each item that the decoder reads. Case does
    not count; tokens are sacrebleu's `13a`."""

    name = "captioning"
    Config = CaptioningConfig
    examples = ({"longest": 6}, {"longest": 5, "beams": 2, "prompt": "a"})

    @classmethod
    def needs(cls, config: CaptioningConfig, plan: Plan) -> Needs:
        """The decoder."""
        heads = _decoders(plan) if config.head is None else [config.head]
        return Needs(heads=tuple(heads[:1]))

    @classmethod
    def problems(cls, config: CaptioningConfig, plan: Plan) -> Iterator[str]:
        """A decoder, of one other modality."""
        decoders = _decoders(plan)
        if config.head is None and len(decoders) != 1:
            has = f"has {', '.join(decoders)}: name one by `head`" if decoders else "has none among its `heads`"
            yield f"{cls.name!r} needs a decoder; the recipe {has}"
        elif config.head in plan.heads and config.head not in decoders:
            yield f"{cls.name!r}: the head {config.head!r} is no decoder"
        elif (head := plan.heads.get(config.head or decoders[0])) is not None and len(_about(head)) != 1:
            yield f"{cls.name!r}: the decoder must read one modality beside the one that it writes"

    @classmethod
    def means(cls, config: CaptioningConfig) -> tuple[str, ...]:
        """Both scores."""
        return ("BLEU", "chrF")

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`BLEU`, `chrF`, the mean `words` of a caption, and `items`."""
        metrics: Any = require_extra("sacrebleu", "captions")
        name, decoder = model.decoder(self.config.head)
        writes = decoder.writes(decoder.config)
        (about,) = set(decoder.reads(decoder.config)) - {writes}
        self._about, self._written = about, dict[tuple[int, str], list[tuple[int, str]]]()
        scores: list[Score] = []
        for samples in sets:
            references: dict[int, list[str]] = {}
            for i, text in samples.items(model, writes, self.config.references):
                references.setdefault(i, []).append(str(text))
            written = [(i, text) for i, text in self._write(model, samples, name) if i in references]
            if not written:
                raise DataError(f"evaluation set {samples.name!r}: no sample with both {about} and {writes}")
            self._written[id(model), samples.name] = written
            most = max(len(references[i]) for i, _ in written)
            # sacrebleu takes the n-th reference of all items together; None where an item has fewer
            texts = [references[i] for i, _ in written]
            columns = [[own[n] if n < len(own) else None for own in texts] for n in range(most)]
            hypotheses = [text for _, text in written]
            bleu = metrics.BLEU(lowercase=True).corpus_score(hypotheses, columns).score
            chrf = metrics.CHRF(lowercase=True).corpus_score(hypotheses, columns).score
            mean_words = sum(len(text.split()) for text in hypotheses) / len(hypotheses)
            scores += [
                Score(samples.name, "BLEU", float(bleu), headline=True),
                Score(samples.name, "chrF", float(chrf)),
                Score(samples.name, "words", mean_words, "words", None),
                Score(samples.name, "items", float(len(written)), "items", None),
            ]
        return [*scores, *mean_over_sets(scores, ("BLEU", "chrF"))]

    def _write(self, model: Model, samples: EvaluationSet, head: str) -> list[tuple[int, str]]:
        """(sample, caption) of all items; each rank writes its share."""
        config = self.config

        def share() -> list[tuple[int, str]]:
            numbers: list[int] = []

            def items() -> Iterator[Any]:
                for i, item in samples.items(model, self._about, share=True):
                    numbers.append(i)
                    yield item

            texts = model.generate(
                self._about, items(), head=head, prompt=config.prompt, beams=config.beams, longest=config.longest
            )
            return list(zip(numbers, map(str, texts), strict=True))

        return sorted(
            (row for part in gather_objects(raise_on_all_ranks(share)) for row in part), key=lambda row: row[0]
        )

    def note(self) -> str:
        """Unit, and what they are."""
        how = "greedy" if self.config.beams == 1 else f"{self.config.beams} beams"
        return f"percent; {how}; BLEU of up to 4 words, chrF of up to 6 letters (sacrebleu, lower case)"

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """A few items with their captions."""
        for i, evaluation_set in enumerate(sets):
            written = self._written[id(model), evaluation_set.name]
            count = min(samples // len(sets) + (i < samples % len(sets)), len(written))
            chosen = [written[n * len(written) // count] for n in range(count)]
            raw = evaluation_set.samples([number for number, _ in chosen])
            augment = model.augment[self._about]
            for number, text in chosen:
                shown = augment.render(augment.eval_view(augment.decode(raw[number])[0]))
                key = str(raw[number]["__key__"])
                rows = {self._about: [shown] if shown is not None else [], "written": [text]}
                context = {"set": evaluation_set.name, "sample": key}
                yield Picture("caption", sheet(list(rows.items())), words(key, rows), context)


def _decoders(plan: Plan) -> list[str]:
    return [name for name, head in plan.heads.items() if issubclass(head.component, Decoder)]


def _about(head: Any) -> set[str]:
    """The modalities that a decoder reads beside the one that it writes."""
    decoder: type[Decoder] = head.component
    return set(decoder.reads(head.config)) - {decoder.writes(head.config)}
