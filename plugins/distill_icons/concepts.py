"""What an icon is called, what is said of it, and which icons may not be parted by the split.

The words are people's: names, tags and categories of the packages. The phrases that hold them together are templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from distill_core import stable_hash
from distill_icons.categories import class_of
from distill_icons.packages import Icon

KEYWORDS = 9
"""Most keywords of an icon: three sentences of three."""
_KEYWORD_TEMPLATES = ("it is about {}", "it goes with {}", "it makes one think of {}")

_NOISE = {
    "icon", "icons", "interface", "logo", "symbol", "sign", "glyph", "filled", "fill", "outline", "ui", "app", "figure",
    "no", "not", "the", "of", "and", "or", "for", "with", "in", "to", "on", "at", "by", "other", "misc", "new",
}  # fmt: skip
_SOME_OTHER_DRAWING = re.compile(r"(?:\d|alt|variant)$")

_MARKS = """
plus minus check checked cancel remove off on edit search alert lock locked unlock unlocked clock cog gear settings
heart star share up down left right top bottom middle center north south east west northeast northwest southeast
southwest circle circles square box rounded hexagon octagon triangle diamond question exclamation x xmark slash
slashed dollar bolt pause play pin code cloud export import in out add delete arrow arrows large small big half full
empty high low medium multiple single first last next previous start end horizontal vertical diagonal clockwise
counterclockwise percent discount query refresh sync key eye user person bluetooth wifi variant alt new old open
opened close closed fast slow inverse reverse rotate rotated forward back backward wide narrow thin bold light dark
simple double triple quarter one two three four five six seven eight nine ten time wrench link broken crossed
warning error info help network marker stop upload download badge move stack text lines line dots dotted dashed
a b c d e f g h i j k l m n o p q r s t u v w y z
"""
_MODIFIERS = frozenset(_MARKS.split())
"""Words at the end of a name that add a mark, a direction, a number or a frame to what is shown."""
_FRAMES = {
    "circle",
    "square",
    "squares",
    "rounded",
    "dashed",
    "hexagon",
    "octagon",
    "rosette",
    "alpha",
    "numeric",
    "device",
}
"""The same at the beginning of a name."""


@dataclass(frozen=True)
class Concept:
    """An icon with all that is said of it. `group` decides its split."""

    icon: Icon
    group: str
    label: str | None
    """Its class: one word or a few, or None where its categories say none or several."""
    keywords: tuple[str, ...]

    @property
    def key(self) -> str:
        """`tabler-arrow-left`."""
        return f"{self.icon.set}-{re.sub(r'[^a-z0-9]+', '-', self.icon.name).strip('-')}"

    @property
    def captions(self) -> list[str]:
        """Sentences without a full stop; at least two."""
        name, category = self.icon.name, next(iter(self.icon.categories), None)
        sentences = [name, f"an icon of {name}"]
        if self.label and class_of(self.icon.categories) != self.label:  # other sets say so
            sentences.append(f"it is a kind of {self.label}")
        elif category:
            sentences.append(f"this {self.label or 'icon'} belongs to {_readable(category)}")
        threes = [self.keywords[i : i + 3] for i in range(0, len(self.keywords), 3)]
        return [*sentences, *(form.format(_listed(w)) for form, w in zip(_KEYWORD_TEMPLATES, threes, strict=False))]


def load(icons: Iterable[Icon]) -> tuple[list[Concept], dict[tuple[str, str], str]]:
    """The icons with their words, by set and name; and why others are left out, by (set, name).

    Left out are second drawings of what the set has (`building 2` beside `building`, unless there is a `building 1`)
    and numbered abstracts. An icon without words of its own has those of its name in the other sets.
    """
    every: dict[tuple[str, str], Icon] = {}
    left_out: dict[tuple[str, str], str] = {}
    for icon in icons:
        every.setdefault((icon.set, icon.name), icon)
    for which, name in every:
        stem, _, end = name.rpartition(" ")
        if stem == "abstract":
            left_out[which, name] = "it has a number for a name"
        elif _SOME_OTHER_DRAWING.fullmatch(end) and (which, stem) in every and (which, f"{stem} 1") not in every:
            left_out[which, name] = f"another drawing of {stem}"
    chosen = [icon for place, icon in sorted(every.items()) if place not in left_out]
    tags: dict[str, list[str]] = {}
    categories: dict[str, list[str]] = {}
    for icon in chosen:
        tags.setdefault(icon.name, []).extend(icon.tags)
        categories.setdefault(icon.name, []).extend(icon.categories)
    group_of = groups(chosen)
    concepts = [
        Concept(
            icon,
            group_of(icon.name),
            class_of(categories[icon.name]),
            keywords(icon.tags, icon.name) or keywords(tags[icon.name], icon.name),
        )
        for icon in chosen
    ]
    return concepts, left_out


def base(name: str) -> str:
    """What is left of a name without marks, directions, numbers and frames, in the singular.

    `circle arrow left` -> `arrow`, `bells off` -> `bell`.
    """
    words = name.split()
    while len(words) > 1 and words[0] in _FRAMES:
        words.pop(0)
    while len(words) > 1 and (words[-1] in _MODIFIERS or words[-1].isdigit()):
        words.pop()
    last = words[-1]
    if len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is")):
        words[-1] = last[:-1]
    return " ".join(words)


def groups(icons: Sequence[Icon]) -> Callable[[str], str]:
    """Name -> its group: its base, or one for all bases that mdi has as aliases of one another (account, user).

    A test concept must not be a training concept with a mark in its corner, or in another set under another name.
    """
    parent = {base(icon.name): base(icon.name) for icon in icons}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for icon in icons:
        if icon.set.startswith("mdi") and not _marked(icon.name):
            for alias in icon.tags:
                if base(alias) in parent and not _marked(alias):
                    first, second = sorted((root(base(alias)), root(base(icon.name))))
                    parent[second] = first
    return lambda name: root(base(name))


def _marked(name: str) -> bool:
    """An alias with a mark in it may say no more than the mark: `add alert` of `bell plus`."""
    words = name.split()
    return len(words) > 1 and not _MODIFIERS.isdisjoint(words)


def split_of(group: str) -> str:
    """`train`, `validation` (10 %) or `test` (15 %), by a fixed hash of the group."""
    where = fraction("split", group)
    return "test" if where < 0.15 else "validation" if where < 0.25 else "train"


def fraction(*parts: object) -> float:
    """A fixed hash in [0, 1)."""
    return stable_hash("icons", *parts) / 2**63


def keywords(tags: Iterable[str], name: str) -> tuple[str, ...]:
    """At most `KEYWORDS`, without what the name or a keyword before says already."""
    words: list[str] = []
    known = _stems(name)
    for tag in tags:
        word = re.sub(r"[\s_-]+", " ", tag).strip().lower()
        parts = _stems(word)
        if not re.fullmatch(r"[a-z0-9 .'+]+", word) or not re.search(r"[a-z]{2}|^\d+$", word):
            continue
        if len(parts) > 4 or word in _NOISE or parts <= known:
            continue
        words.append(word)
        known |= parts
    return tuple(words[:KEYWORDS])


def _stems(text: str) -> set[str]:
    """Its words, without the end that makes a plural or a participle: `groceries` says what `grocery` said."""
    return {re.sub(r"(?<=\w{3})(?:ies|y|es|s|ing|ed)$", "", word) for word in text.split()}


def _readable(category: str) -> str:
    """`Food / Drink` -> `food and drink`, `Fruits + Vegetables` -> `fruits and vegetables`."""
    return re.sub(r"\s*[/&+]\s*", " and ", category).replace("-", " ").lower()


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
