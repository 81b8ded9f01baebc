"""`distill bench data` measures both sides of the recipe's own views, and says what it needs."""

import io
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from distill_core.errors import UserError
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_vl.bench import Ours, Plain, bench_data, photo
from distill_vl.commands import data
from distill_vl.multi_crop import MultiCrop


@pytest.mark.slow
def test_every_part_has_both_sides() -> None:
    """Catches a part that only one side has, and a whole that leaves parts out."""
    options = ["cosmos_tiny", "--rounds", "2", "--images", "2", "--size", "120", "90"]
    result = CliRunner().invoke(data, [*options, "--json"], catch_exceptions=False)
    rows = {row["part"]: row for row in json.loads(result.output)}
    parts = {"decode", "crop", "color", "blur", "normalize"}
    assert rows.keys() == parts | {"all on the CPU", "device: model", "tokenize"}
    whole, crops = rows["all on the CPU"], rows["device: model"]
    assert 0 < crops["ours_ms"] < whole["ours_ms"]
    assert whole["plain_ms"] == crops["plain_ms"] == pytest.approx(sum(rows[p]["plain_ms"] for p in parts), rel=0.5)
    assert all(row["plain_ms"] > 0 for row in rows.values())
    shown = CliRunner().invoke(data, options, catch_exceptions=False).output
    assert "cores for 800 samples/s: plain" in shown


def test_both_sides_make_the_recipes_views() -> None:
    """Catches a plain chain with another number of views, or with other sizes."""
    config = MultiCrop.Config.model_validate({"size": 32, "local_size": 16, "global": 2, "local": 3})
    plain = Plain(config)
    image = Image.open(io.BytesIO(photo(90, 70, 0)))
    sizes = []
    for parts in plain.views:
        made = image
        for transform in parts.values():
            made = transform(made)
        sizes.append(tuple(made.shape))
    assert tuple(sizes) == MultiCrop.shapes(config)
    ours = Ours(MultiCrop(config))
    views = ours.whole.train_views({"jpg": photo(90, 70, 0)}, np.random.default_rng(0))
    assert [tuple(view.data.shape) for view in views] == sizes
    assert ours.without_colors.config.device == "model"


def test_what_it_needs(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"width": 60, "height": 50, "images": 1, "rounds": 1, "say": print}
    with pytest.raises(UserError, match="only multi_crop and random_crop"):
        bench_data(load_recipe("slip_tiny", registry=registry), **options)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(UserError, match=r"torchvision.*pip install 'selfdistill\[test\]'"):
        bench_data(load_recipe("cosmos_tiny", registry=registry), **options)  # type: ignore[arg-type]
