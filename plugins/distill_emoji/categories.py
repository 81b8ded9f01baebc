"""Readable words for Unicode's emoji sub-categories: the classes of zero-shot classification.

Each reads well in "a picture of a ..."; each sub-category has a class of its own.
"""

from __future__ import annotations

CLASSES: dict[str, str] = {
    # Smileys & Emotion
    "face-smiling": "smiling face",
    "face-affection": "loving or kissing face",
    "face-tongue": "face with its tongue out",
    "face-hand": "face with a hand",
    "face-neutral-skeptical": "neutral or sceptical face",
    "face-sleepy": "sleepy face",
    "face-unwell": "sick face",
    "face-hat": "face with a hat",
    "face-glasses": "face with glasses",
    "face-concerned": "worried or sad face",
    "face-negative": "angry or evil face",
    "face-costume": "monster or costume face",
    "cat-face": "cat face",
    "monkey-face": "monkey face",
    "heart": "heart",
    "emotion": "sign of an emotion",
    # People & Body
    "hand-fingers-open": "hand with open fingers",
    "hand-fingers-partial": "hand with some fingers raised",
    "hand-single-finger": "hand with one pointing finger",
    "hand-fingers-closed": "fist or closed hand",
    "hands": "pair of hands",
    "hand-prop": "hand holding a thing",
    "body-parts": "part of the body",
    "person": "person",
    "person-gesture": "person making a gesture",
    "person-role": "person at work",
    "person-fantasy": "fantasy person",
    "person-activity": "person doing an activity",
    "person-sport": "person doing a sport",
    "person-resting": "person at rest",
    "family": "couple or family",
    "person-symbol": "symbol of a person",
    # Animals & Nature
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "amphibian",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "insect or bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    # Food & Drink
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "asian dish",
    "food-marine": "seafood",
    "food-sweet": "sweet or dessert",
    "drink": "drink",
    "dishware": "piece of tableware",
    # Travel & Places
    "place-map": "globe or map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "religious building",
    "place-other": "place or attraction",
    "transport-ground": "land vehicle or road sign",
    "transport-water": "boat or ship",
    "transport-air": "aircraft",
    "hotel": "hotel item",
    "time": "clock",
    "sky & weather": "sky or weather",
    # Activities
    "event": "celebration",
    "award-medal": "award or medal",
    "sport": "piece of sports equipment",
    "game": "game or toy",
    "arts & crafts": "art or craft",
    # Objects
    "clothing": "piece of clothing",
    "sound": "sound device",
    "music": "music device",
    "musical-instrument": "musical instrument",
    "phone": "phone",
    "computer": "computer or disk",
    "light & video": "lamp or camera",
    "book-paper": "book or paper",
    "money": "money",
    "mail": "mail or mailbox",
    "writing": "pen or pencil",
    "office": "office supply",
    "lock": "lock or key",
    "tool": "tool or weapon",
    "science": "scientific instrument",
    "medical": "medical item",
    "household": "household item",
    "other-object": "curious object",
    # Symbols
    "transport-sign": "public sign",
    "warning": "warning sign",
    "arrow": "arrow",
    "religion": "religious symbol",
    "zodiac": "zodiac sign",
    "av-symbol": "player button",
    "gender": "gender symbol",
    "math": "mathematical sign",
    "punctuation": "punctuation mark",
    "currency": "currency sign",
    "other-symbol": "symbol or emblem",
    "keycap": "keycap digit",
    "alphanum": "button with letters or characters",
    "geometric": "geometric shape",
    # Flags
    "flag": "special flag",
    "country-flag": "country flag",
    "subdivision-flag": "flag of a region",
}


def readable(words: str) -> str:
    """`Animals & Nature` -> `animals and nature`, `animal-mammal` -> `animal mammal`."""
    return words.replace("-", " ").replace("&", "and").lower()


def class_of(subcategory: str) -> str:
    """The class text of a sub-category; a sub-category that is new to us is read as it is written."""
    return CLASSES.get(subcategory, readable(subcategory))
