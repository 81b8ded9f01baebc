"""Stand-ins for what a recipe takes from other runs."""

from pathlib import Path


def stand_ins(recipe: Path) -> list[str]:
    """Overrides with which a recipe's step can be made where its teachers' weights and caches are not."""
    if recipe.stem.startswith("mobileclip"):
        return ["teacher={name: ema}", "loss.0.members=null"]
    if recipe.stem.startswith("clipself"):  # a copy of the student's tower sees the picture, and no regions
        return ["teacher={name: ema}", "loss.0.role=global"]
    return []
