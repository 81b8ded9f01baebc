"""SVG to pixels; the shards of drawn pictures are tested with their sources, in tests/emoji and tests/icons."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from distill_drawn.svg import Refused, png_of, rasterize, squared

pytest.importorskip("resvg_py", reason="resvg-py is not installed")

RED = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}"><rect width="{0}" height="{1}" fill="{2}"/></svg>'


@pytest.mark.parametrize(("width", "height"), [(4, 4), (8, 4), (3, 9)])
def test_a_drawing_keeps_its_form_in_a_square(width: int, height: int) -> None:
    """Catches a drawing that is stretched, cut, or not in the middle."""
    with Image.open(BytesIO(rasterize(RED.format(width, height, "red"), 36, "a.svg"))) as drawn:
        assert max(drawn.size) == 36
        assert drawn.width * height == pytest.approx(drawn.height * width, abs=2 * max(width, height))
        square = squared(drawn, 36)
    assert (square.mode, square.size) == ("RGBA", (36, 36))
    left, top, right, bottom = square.getbbox() or (0, 0, 0, 0)
    assert abs(left - (36 - right)) <= 1
    assert abs(top - (36 - bottom)) <= 1
    assert (right - left) * height == pytest.approx((bottom - top) * width, abs=2 * max(width, height))


def test_an_edge_is_not_darkened() -> None:
    """Transparent pixels are black beneath: catches a resize that mixes them into the color of the edge."""
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((250, 20, 20, 255), (10, 10, 31, 31))
    pixels = np.asarray(squared(picture, 16)).astype(int)
    edge = pixels[(pixels[..., 3] > 60) & (pixels[..., 3] < 200)]
    assert len(edge) > 8
    assert np.abs(edge[:, :3] - (250, 20, 20)).max() <= 8


def test_a_square_of_the_right_size_is_left_as_it_is() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8), "RGBA")
    with Image.open(BytesIO(png_of(squared(picture, 9)))) as again:
        assert np.array_equal(np.asarray(again), np.asarray(picture))


@pytest.mark.parametrize(
    ("svg", "why"),
    [("<svg", r"bad\.svg: "), (RED.format(4, 4, "none"), "blank"), ("not a drawing", r"bad\.svg: ")],
    ids=["cut off", "nothing in it", "no SVG"],
)
def test_what_gives_no_picture_is_refused(svg: str, why: str) -> None:
    """Catches a picture of nothing, and an error of the library's own."""
    with pytest.raises(Refused, match=why):
        rasterize(svg, 16, "bad.svg")
