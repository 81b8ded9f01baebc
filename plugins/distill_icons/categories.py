"""The sets' own categories, reworded as the classes of zero-shot classification.

Each class reads well in "a picture of a ...". Categories of use rather than of looks (system, commerce, design) are no
class, and neither are those of which a class would hold two things (weather and nature).
"""

from __future__ import annotations

from collections.abc import Iterable

CLASSES: dict[str, tuple[str, ...]] = {
    "animal": ("animal", "animals"),
    "food or drink": ("food / drink", "food", "food + beverage", "fruits + vegetables"),
    "plant or landscape": ("nature",),
    "weather sign": ("weather",),
    "vehicle": (
        "automotive", "transportation + road", "transportation + flying", "transportation + water",
        "transportation + other", "vehicles", "transportation",
    ),
    "building": ("places", "buildings"),
    "person": ("account / user", "people / family", "people", "users + people", "user"),
    "face": ("emoji", "mood"),
    "hand": ("hands", "gestures"),
    "piece of clothing": ("clothing", "clothing + fashion"),
    "sport": ("sport", "sports + fitness"),
    "game": ("gaming / rpg", "games", "gaming"),
    "music or sound": ("music", "audio", "music + audio"),
    "camera or film": ("video / movie", "photography", "film + video", "photos + images"),
    "medical sign": ("medical / hospital", "health", "health + beauty", "medical + health"),
    "scientific sign": ("science", "astronomy"),
    "tool": ("hardware / tools",),
    "piece of furniture or household item": ("household",),
    "religious sign": ("religion",),
    "sign of money": ("banking", "currency", "currencies", "money"),
    "clock or calendar": ("date / time", "time"),
    "phone": ("cellphone / phone",),
    "computer or device": ("device / tech", "computers", "devices + hardware"),
    "battery": ("battery",),
    "electric part": ("electrical",),
    "printer": ("printer",),
    "file or folder": ("files / folders", "document", "files", "file"),
    "chart": ("charts", "charts + diagrams"),
    "sign of a message": ("communication",),
    "programming sign": ("developer / languages", "development", "version control", "coding"),
    "database": ("database",),
    "lock or shield": ("lock", "security"),
    "text mark": ("text / content / format", "text", "text formatting", "formatting"),
    "letter or number": ("alpha / numeric", "letters", "numbers", "alphabet", "alphanumeric"),
    "mathematical sign": ("math", "mathematics"),
    "arrow": ("arrow", "arrows"),
    "geometric shape": ("shape", "shapes"),
    "zodiac sign": ("zodiac",),
    "gender sign": ("gender", "genders"),
    "laundry sign": ("laundry",),
}  # fmt: skip
"""Class -> the categories that are it, in lower case."""

_CLASS_OF = {category: name for name, categories in CLASSES.items() for category in categories}


def class_of(categories: Iterable[str]) -> str | None:
    """The one class that all categories say; None where they say none or several."""
    classes = {_CLASS_OF[category.lower()] for category in categories if category.lower() in _CLASS_OF}
    return classes.pop() if len(classes) == 1 else None
