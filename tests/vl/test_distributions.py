"""Thousands of draws of multi-crop beside torchvision's chain: the same distributions, but for the hue's arithmetic."""

import io
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as reference
from PIL import Image, ImageFilter, ImageOps

from distill_vl.multi_crop import MultiCrop
from distill_vl.pictures import crop_box, draw_colours
from distill_vl.recolouring import Recolouring

pytestmark = pytest.mark.slow

DRAWS = 4000
STRENGTHS = (0.4, 0.4, 0.2, 0.1)


def distance(a: Any, b: Any) -> float:
    """Kolmogorov-Smirnov's statistic of two samples, as a multiple of what one in a thousand pairs of samples of one
    distribution reaches."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    places = np.concatenate([a, b])
    apart = np.abs(np.searchsorted(a, places, "right") / len(a) - np.searchsorted(b, places, "right") / len(b)).max()
    return float(apart / (1.95 * np.sqrt(1 / len(a) + 1 / len(b))))


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(500, 400), (300, 900)])
def test_boxes(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Area, aspect and place; also of a picture in which many draws do not fit."""
    rng, (width, height) = np.random.default_rng(0), size
    torch.manual_seed(0)
    ours = np.array([crop_box(width, height, scale, rng) for _ in range(DRAWS)], float)
    image = torch.empty(3, height, width)
    drawn = [reference.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in drawn], float)
    for what in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert distance(what(ours), what(theirs)) < 1


def recorded(count: int) -> tuple[list[list[tuple[str, float]]], list[Recolouring]]:
    """The operations of as many draws, in order, and what was drawn."""
    config = MultiCrop.Config()
    calls: list[list[tuple[str, float]]] = []

    class Recorded(Recolouring):
        def brightness(self, factor: float) -> None:
            calls[-1].append(("brightness", factor))

        def contrast(self, factor: float) -> None:
            calls[-1].append(("contrast", factor))

        def saturation(self, factor: float) -> None:
            calls[-1].append(("saturation", factor))

        def hue(self, turn: float) -> None:
            calls[-1].append(("hue", turn))

        def grey(self) -> None:
            calls[-1].append(("grey", 0.0))

    rng, drawn = np.random.default_rng(1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill_vl.pictures.Recolouring", Recorded)
        for _ in range(count):
            calls.append([])
            drawn.append(draw_colours(config, rng, blur=0.5, solarise=0.2))
    return calls, drawn


def test_what_is_drawn_of_colours() -> None:
    """Strengths, order, and how often; blur and solarising."""
    calls, drawn = recorded(DRAWS)
    jitters = [[call for call in each if call[0] != "grey"] for each in calls]
    jittered = [each for each in jitters if each]
    share = 3.3 * np.sqrt(0.25 / DRAWS)  # one in a thousand is further off, at most
    assert abs(len(jittered) / DRAWS - 0.8) < share
    assert abs(np.mean([("grey", 0.0) in each for each in calls]) - 0.2) < share
    assert abs(np.mean([colours.solarise for colours in drawn]) - 0.2) < share
    blurs = [colours.blur for colours in drawn if colours.blur]
    assert abs(len(blurs) / DRAWS - 0.5) < share
    assert distance(blurs, np.linspace(0.1, 2.0, 20_000)) < 1
    torch.manual_seed(0)
    jitter = reference.ColorJitter(*STRENGTHS)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(DRAWS)
    ]
    names = ("brightness", "contrast", "saturation", "hue")
    for i, name in enumerate(names):
        assert distance([dict(each)[name] for each in jittered], [params[i + 1] for params in theirs]) < 1, name
    orders = [tuple(name for name, _ in each) for each in jittered]
    counts = np.array([orders.count(order) for order in permutations(names)])
    expected = len(jittered) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7, "chi squared, 23 degrees of freedom: one in a thousand"


def chain(size: int, scale: tuple[float, float], blur: float, solarise: float, hue: float) -> Callable[[Any], Any]:
    """The public codes' chain of torchvision's transforms and PIL's filters."""
    radius = reference.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0))))
    invert = reference.Lambda(lambda image: ImageOps.solarize(image, 128))
    return reference.Compose(
        [
            reference.RandomResizedCrop(size, scale, interpolation=reference.InterpolationMode.BICUBIC),
            reference.RandomHorizontalFlip(),
            reference.RandomApply([reference.ColorJitter(*STRENGTHS[:3], hue)], p=0.8),
            reference.RandomGrayscale(0.2),
            reference.RandomApply([radius], p=blur),
            reference.RandomApply([invert], p=solarise),
        ]
    )


MOMENTS: dict[str, Callable[[np.ndarray], float]] = {
    "red": lambda x: x[..., 0].mean(),
    "green": lambda x: x[..., 1].mean(),
    "blue": lambda x: x[..., 2].mean(),
    "spread": lambda x: x.mean(-1).std(),
    "color": lambda x: (x.max(-1) - x.min(-1)).mean(),
    "edges": lambda x: np.abs(np.diff(x.mean(-1), axis=1)).mean(),
    "left to right": lambda x: x[:, :16].mean() - x[:, 16:].mean(),
}


def moments_of(images: list[np.ndarray]) -> dict[str, list[float]]:
    return {name: [moment(x) for x in images] for name, moment in MOMENTS.items()}


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """Smooth, of many colours, brighter to the left."""
    rng = np.random.default_rng(4)
    low = rng.integers(20, 236, (6, 8, 3)) - np.linspace(-40, 40, 8)[None, :, None]
    return Image.fromarray(low.clip(0, 255).astype(np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("hue", [0.0, 0.1])
def test_moments_of_views(scene: Image.Image, hue: float) -> None:
    """Global and local views as a whole. With a hue brightness has weaker edges than in HSV (docs/recipes.md)."""
    file = io.BytesIO()
    scene.save(file, "PNG")
    config = MultiCrop.Config(size=32, local_size=32, local=2, jitter=(*STRENGTHS[:3], hue))
    augmentation, count = MultiCrop(config), 1500
    made = [augmentation.train_views({"png": file.getvalue()}, np.random.default_rng(i)) for i in range(count)]
    torch.manual_seed(0)
    np.random.seed(0)
    chains = [
        (0, chain(32, (0.4, 1.0), 1.0, 0.0, hue)),
        (1, chain(32, (0.4, 1.0), 0.1, 0.2, hue)),
        (2, chain(32, (0.05, 0.4), 0.5, 0.0, hue)),
    ]
    for number, transform in chains:
        ours = moments_of([views[number].data.permute(1, 2, 0).numpy().astype(float) for views in made])
        theirs = moments_of([np.asarray(transform(scene)).astype(float) for _ in range(count)])
        for name in MOMENTS:
            apart = distance(ours[name], theirs[name])
            if hue and name == "edges":
                assert 0.85 < np.mean(ours[name]) / np.mean(theirs[name]) <= 1.02, number
            else:
                assert apart < (1.3 if hue else 1), (number, name, apart)
