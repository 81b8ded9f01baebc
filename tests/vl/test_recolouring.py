"""Colours of crops: each operation against torchvision's, on the CPU and as the training device does them."""

import colorsys
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image
from torch import Tensor

from distill_core import Group, Views, with_extra
from distill_core.errors import BadSample
from distill_slip.views import SlipViews
from distill_vl import pictures, recolouring
from distill_vl.multi_crop import MultiCrop
from distill_vl.pictures import PictureAugmentation, reduction
from distill_vl.recolouring import Recolouring


def image_of(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def make(cls: type[PictureAugmentation] = MultiCrop, **options: Any) -> Any:
    return cls(cls.Config.model_validate_json(json.dumps(options)))


def collated(samples: list[list[Any]]) -> Views:
    """By role, as a backbone's collator does."""
    groups: dict[str, list[int]] = {}
    for i, view in enumerate(samples[0]):
        groups.setdefault(view.role, []).append(i)
    stacked = [
        Group(torch.stack([torch.stack([sample[i].data for sample in samples]) for i in members]), role)
        for role, members in groups.items()
    ]
    return with_extra(Views(stacked), samples)


OPERATIONS = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
}


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 2.5])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str, factor: float) -> None:
    image, drawn = image_of(40, 30), Recolouring()
    getattr(drawn, name)(factor)
    expected = np.asarray(OPERATIONS[name](image, factor)).astype(int)
    assert np.abs(drawn(tensor(image)).permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("seed", range(30))
def test_sequences_are_torchvisions_in_their_order(seed: int) -> None:
    """Catches operations that share a stage although something would be clipped between them, and a contrast that takes
    the grey of another stage. PIL rounds after each."""
    rng = np.random.default_rng(seed)
    image, drawn = image_of(40, 30, seed), Recolouring()
    expected = image
    for name in rng.permutation(list(OPERATIONS)):
        factor = float(rng.uniform(0.3, 1.9))
        getattr(drawn, name)(factor)
        expected = OPERATIONS[name](expected, factor)
    if seed % 2:
        drawn.grey()
        expected = reference.to_grayscale(expected, 3)
    assert np.abs(drawn(tensor(image)).permute(1, 2, 0).numpy() - np.asarray(expected).astype(int)).max() <= 4


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_torchvisions_at_equal_luma(turn: float) -> None:
    """Catches a turn the other way round, or of another size: HSV's hue moves by about as much. Luma and grey stay."""
    drawn = Recolouring()
    drawn.hue(turn)
    rng = np.random.default_rng(0)
    colours = rng.uniform(90, 165, (500, 3))
    made = drawn(torch.from_numpy(colours.round().astype(np.uint8)).T[:, :, None])[:, :, 0].T.numpy().astype(float)
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((made - colours.round()) @ luma).max() <= 1
    before, after = (np.array([colorsys.rgb_to_hsv(*(c / 255)) for c in rows]) for rows in (colours, made))
    moved = (after[:, 0] - before[:, 0] + 0.5) % 1 - 0.5
    vivid = before[:, 1] > 0.25
    assert abs(np.median(moved[vivid]) - turn) < 0.012
    assert np.abs(moved[vivid] - turn).max() < 0.6 * abs(turn) + 0.03
    grey = torch.full((3, 2, 2), 77, dtype=torch.uint8)
    assert torch.equal(drawn(grey), grey)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.9])
def test_blur_is_a_gaussian(sigma: float) -> None:
    image, drawn = image_of(40, 30), Recolouring()
    drawn.blur = sigma
    wide = torch.nn.functional.pad(tensor(image).float(), (8, 8, 8, 8), mode="replicate")  # torchvision's reflects
    expected = reference.gaussian_blur(wide, [17, 17], [sigma, sigma])[:, 8:-8, 8:-8]
    assert (drawn(tensor(image)) - expected).abs().max() < 1.5


def test_solarising_is_torchvisions() -> None:
    image, drawn = image_of(40, 30), Recolouring()
    drawn.solarise = True
    assert np.array_equal(drawn(tensor(image)).permute(1, 2, 0).numpy(), np.asarray(reference.solarize(image, 128)))


@pytest.mark.parametrize("cls", [MultiCrop, SlipViews])
def test_the_training_device_makes_the_same_views(cls: type[PictureAugmentation]) -> None:
    """Catches other draws, stages that are padded wrongly, blurs of the wrong view, extras that are mixed up."""
    sizes = {"size": 48, "local_size": 24} if cls is MultiCrop else {"size": 48}
    here, there = make(cls, **sizes), make(cls, **sizes, device="model")
    samples = [{"__key__": str(i), "jpg": jpeg(image_of(90, 70, i))} for i in range(12)]
    batches = []
    for augmentation in (here, there):
        views = [augmentation.train_views(s, np.random.default_rng(i)) for i, s in enumerate(samples)]
        assert all(view.data.dtype == torch.uint8 for each in views for view in each)
        before = collated(views)
        untouched = before.map(torch.clone)
        with torch.autocast("cpu", torch.bfloat16):  # as training's step is: nothing of a pixel may be lost to it
            batches.append((augmentation.on_device(before), views))
        for group, same in zip(before.groups, untouched.groups, strict=True):
            assert torch.equal(group.x, same.x)
    std = torch.tensor(here.config.std).view(3, 1, 1) * 255
    different = 0
    for a, b in zip(batches[0][0].groups, batches[1][0].groups, strict=True):
        assert a.role == b.role
        assert a.x.dtype == b.x.dtype == torch.float32
        assert a.extra.keys() == b.extra.keys() == {"box", "flip"}
        assert torch.equal(a.extra["box"], b.extra["box"])
        levels = (a.x - b.x).abs() * std
        assert levels.max() < 1.01
        different += (levels > 0.5).float().mean().item()
    assert different < 0.01
    for one, other in zip(batches[0][1][0], batches[1][1][0], strict=True):  # what trackers show
        shown, same = (np.asarray(x.render(v)).astype(int) for x, v in ((here, one), (there, other)))
        assert np.abs(shown - same).max() <= 1


def test_pixels_are_normalised_on_the_device_alone_and_once() -> None:
    augmentation = make(size=16, local=0)
    x = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    views = augmentation.on_device(Views([Group(x)]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augmentation.config.mean, augmentation.config.std))
    torch.testing.assert_close(views.groups[0].x, (x / 255 - mean) / std, rtol=0, atol=2e-6)
    assert augmentation.on_device(views).groups[0].x is views.groups[0].x


def test_a_collator_that_drops_extras_is_an_error() -> None:
    with pytest.raises(ValueError, match="came without their extras"):
        make(size=16, device="model").on_device(Views([Group(torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8))]))


def test_large_jpegs_are_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches crops cut where they stand in the full picture, and a scale at which they lack pixels."""
    shapes = []

    def decode(*args: Any, **options: Any) -> Any:
        shapes.append((made := decode_jpeg(*args, **options)).shape)
        return made

    decode_jpeg = pictures.decode_jpeg
    monkeypatch.setattr(pictures, "decode_jpeg", decode)
    image = image_of(1203, 901)
    plain = {"jitter_p": 0.0, "grey": 0.0, "blur": [0, 0, 0], "solarise": 0.0, "local": 0, "global_scale": [0.5, 1.0]}
    whole = make(**plain, size=64).train_views({"png": jpeg(image)}, np.random.default_rng(1))
    assert shapes == [(226, 301, 3)]  # a quarter: the crops have at least 1.5 times the pixels of a view
    for view in whole:
        box = [round(v) for v in (view.extra["box"] * [1203, 901, 1203, 901]).tolist()]
        expected = image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        expected = reference.hflip(expected) if view.extra["flip"] else expected
        assert (view.data - tensor(expected).float()).abs().mean() < 1.5
    make(**plain, size=640).train_views({"png": jpeg(image)}, np.random.default_rng(1))
    assert shapes[1:] == [(901, 1203, 3)]


def test_the_reduction_leaves_each_crop_enough_pixels() -> None:
    crop = pictures.Crop
    assert [reduction([crop((0, 0, side, 2000), 100)]) for side in (299, 300, 599, 600, 1200)] == [1, 2, 2, 4, 8]
    assert reduction([crop((0, 0, 2000, 2000), 100), crop((0, 0, 2000, 100), 100)]) == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"mode": "L"},
                                     {"mode": "CMYK"}])  # fmt: skip
def test_jpegs_are_decoded_as_pillow_does(options: dict[str, Any]) -> None:
    """Training decodes with another package than evaluation; grey and CMYK ones with Pillow."""
    mode = options.pop("mode", "RGB")
    data = jpeg(image_of(61, 47).convert(mode), **options)
    augmentation = make()
    assert np.array_equal(augmentation.pixels(data), np.asarray(augmentation.open(data)))


def test_a_truncated_jpeg_is_bad() -> None:
    data = jpeg(image_of(200, 150))
    with pytest.raises(BadSample, match="truncated"):
        make().train_views({"__key__": "k", "jpg": data[: len(data) // 2]}, np.random.default_rng(0))


def test_a_bug_in_drawing_is_no_bad_sample() -> None:
    def draw(width: int, height: int) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make().train_crops({"__key__": "k", "jpg": jpeg(image_of(20, 15))}, draw)


def test_exif_orientation_turns_the_picture_before_it_is_cropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(image_of(60, 30), exif=exif)
    seen = []

    def draw(width: int, height: int) -> list[pictures.Crop]:
        seen.append((width, height))
        return [pictures.Crop((0, 0, width, height), 30)]

    for turned in (False, True):
        view = make(exif_orientation=turned).train_crops({"jpg": data}, draw)[0]
        expected = make(exif_orientation=turned).open(data).resize((30, 30), Image.Resampling.BICUBIC)
        assert (view.data.int() - tensor(expected).int()).abs().max() <= 1
    assert seen == [(60, 30), (30, 60)]


def test_a_device_is_sent_constants_once() -> None:
    """A copy from the host makes it wait for a GPU; `meta` stands for one. Catches constants made at each step."""
    augmentation = make(size=16, local_size=8, device="model")
    views = collated([augmentation.train_views({"jpg": jpeg(image_of(40, 30))}, np.random.default_rng(0))])
    views = views.map(lambda x: x.to("meta"))
    made = augmentation.on_device(views)
    assert [group.x.shape for group in made.groups] == [group.x.shape for group in views.groups]
    before = recolouring._kept.cache_info().misses
    augmentation.on_device(views)
    assert recolouring._kept.cache_info().misses == before > 0
