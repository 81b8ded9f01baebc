"""Multi-crop: sizes, areas, and each recolouring against torchvision's."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image

from distill_core.errors import BadSample
from distill_vl.multi_crop import MultiCrop
from distill_vl.pictures import crop_box


def make(**options: Any) -> MultiCrop:
    return MultiCrop(MultiCrop.Config.model_validate_json(json.dumps(options)))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (5, 7, 4 if mode == "RGBA" else 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"__key__": "k", "png": buffer.getvalue()}


def test_the_papers_views() -> None:
    views = make().train_views(png(picture(320, 240)), np.random.default_rng(0))
    assert [(view.role, tuple(view.data.shape)) for view in views] == [("global", (3, 224, 224))] * 2 + [
        ("local", (3, 96, 96))
    ] * 6
    assert MultiCrop.roles(MultiCrop.Config()) == ("global",) * 2 + ("local",) * 6
    assert all(view.data.dtype == torch.uint8 for view in views)
    assert not torch.equal(views[0].data, views[1].data)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_areas_fill_the_range_and_aspects_stay_within_bounds(scale: tuple[float, float]) -> None:
    """Catches area and side mixed up (square root forgotten), and crops outside the picture."""
    shares = []
    for seed in range(600):
        left, top, width, height = crop_box(400, 300, scale, np.random.default_rng(seed))
        assert left >= 0
        assert top >= 0
        assert left + width <= 400
        assert top + height <= 300
        assert 0.74 < width / height < 1.35
        shares.append(width * height / (400 * 300))
    shares_array = np.array(shares)
    assert shares_array.min() >= scale[0] * 0.97
    assert shares_array.max() <= scale[1] * 1.03
    assert shares_array.min() < scale[0] + 0.05 * (scale[1] - scale[0])
    if scale == (0.05, 0.4):
        # uniform: the mean is the middle (the larger range loses draws that do not fit)
        assert abs(shares_array.mean() - 0.225) < 0.015


def test_a_picture_too_long_for_any_draw_gives_the_largest_centred_box() -> None:
    left, top, width, height = crop_box(1000, 20, (0.9, 1.0), np.random.default_rng(0))
    assert (top, height) == (0, 20)
    assert width == 27
    assert abs(left - (1000 - 27) / 2) <= 1


def test_a_crop_is_torchvisions_resized_crop() -> None:
    """Catches an interpolation that is not antialiased, and a box that is moved or flipped wrongly."""
    options = {"local": 0, "jitter_p": 0.0, "grey": 0.0, "blur": [0, 0, 0], "solarise": 0.0, "size": 64, "flip": 0.5}
    image, flips = picture(200, 150), 0
    for seed in range(8):
        for view in make(**options).train_views(png(image), np.random.default_rng(seed)):
            left, top, right, bottom = (view.extra["box"] * [200, 150, 200, 150]).round().astype(int)
            expected = reference.resized_crop(
                image, top, left, bottom - top, right - left, [64, 64], reference.InterpolationMode.BICUBIC
            )
            if view.extra["flip"]:
                expected, flips = reference.hflip(expected), flips + 1
            difference = np.abs(np.asarray(expected).astype(int) - view.data.permute(1, 2, 0).numpy())
            assert difference.max() <= 2  # of fixed-point arithmetic
            assert difference.mean() < 0.02
    assert 0 < flips < 16


@pytest.mark.slow
def test_probabilities() -> None:
    """Catches a recolouring that is always or never applied, or applied to the wrong crop."""
    plain = {"jitter_p": 0.0, "grey": 0.0, "blur": [0, 0, 0], "solarise": 0.0, "flip": 0.0, "size": 16, "local_size": 8}
    sample = png(picture(64, 64))

    def different(option: dict[str, Any]) -> np.ndarray:
        base, changed = make(**plain, local=1), make(**{**plain, **option}, local=1)
        counts = np.zeros(3)
        for seed in range(100):
            # crops are drawn before each recolouring, so view 0 has the same box in both
            a = base.train_views(sample, np.random.default_rng(seed))
            b = changed.train_views(sample, np.random.default_rng(seed))
            counts += [float(not torch.equal(x.data, y.data)) for x, y in zip(a, b, strict=True)]
        return counts

    assert different({"grey": 1.0})[0] == 100
    assert different({"solarise": 1.0})[0] == 0
    assert different({"solarise": 1.0})[1] == 100
    assert different({"blur": [0.0, 0.0, 1.0]})[:2].tolist() == [0, 0]
    assert 30 < different({"flip": 0.5})[0] < 70


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_teachers_views_are_the_same_crops_in_their_own_colours(device: str) -> None:
    """`recolour: false` draws what it leaves out. Catches crops after the first that are others, and colours that are
    changed all the same."""
    options = {"size": 32, "local_size": 16, "local": 2, "device": device}
    sample, changed = png(picture(90, 70)), 0
    for seed in range(5):
        ours, plain = (
            make(**options, recolour=recolour).train_views(sample, np.random.default_rng(seed))
            for recolour in (True, False)
        )
        for a, b in zip(ours, plain, strict=True):
            assert np.array_equal(a.extra["box"], b.extra["box"])
            assert a.extra["flip"] == b.extra["flip"]
            changed += not torch.equal(a.data, b.data)
        none = {"jitter_p": 0.0, "grey": 0.0, "blur": (0.0, 0.0, 0.0), "solarise": 0.0}
        first = make(**options, **none).train_views(sample, np.random.default_rng(seed))[0]
        assert torch.equal(plain[0].data, first.data)
    assert changed if device == "cpu" else not changed


def test_transparent_pixels_take_the_background() -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    view = make(size=16, background=[255, 0, 0], mean=[0, 0, 0], std=[1, 1, 1]).eval_view(clear)
    assert torch.equal(view.data.amax((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_plain_view_is_resize_and_centre_crop() -> None:
    image = picture(90, 60)
    config = MultiCrop.Config(size=32)
    expected = reference.center_crop(reference.resize(image, 32, reference.InterpolationMode.BICUBIC), [32, 32])
    expected = reference.normalize(reference.to_tensor(expected), list(config.mean), list(config.std))
    assert (MultiCrop(config).eval_view(image).data - expected).abs().max() < 1e-5


@pytest.mark.parametrize("data", [b"", b"not a picture", None, 3])
def test_unreadable_pictures_are_bad(data: Any) -> None:
    with pytest.raises(BadSample):
        make().eval_view(data)
    with pytest.raises(BadSample, match="no picture"):
        make().decode({"__key__": "k", "txt": b"x"})


def test_a_truncated_png_is_bad() -> None:
    whole = png(picture(64, 64))["png"]
    with pytest.raises(BadSample):
        make().train_views({"__key__": "k", "png": whole[: len(whole) // 2]}, np.random.default_rng(0))
