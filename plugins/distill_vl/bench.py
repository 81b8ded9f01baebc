"""`distill bench data RECIPE`: what a sample costs a core, by part, beside torchvision's transforms of PIL images."""

from __future__ import annotations

import io
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from distill_core import UserError, View, require_extra
from distill_core.tools import Plugins, Recipe, keep_freed_memory
from distill_vl.clip_text import ClipTextConfig
from distill_vl.multi_crop import MultiCrop, MultiCropConfig
from distill_vl.pictures import PictureAugmentation, RecolourConfig
from distill_vl.random_crop import RandomCrop, RandomCropConfig
from distill_vl.tokenizer import ClipTokenizer
from distill_vl.vit import PictureCollator

CPU, MODEL, TOKENIZE = "all on the CPU", "device: model", "tokenize"
"""Beside the parts decode, crop (with its draws and flip), color (with grey), blur (with solarising) and normalize."""


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90 whose spectrum falls as a photograph's, 1 / f, in three colors that mostly agree.

    125 kB at 500 x 400, as Flickr30k's: smaller files decode faster.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, (height, width))
    noise /= noise.std((1, 2), keepdims=True)
    pixels = (120 + 50 * (0.8 * noise[:1] + 0.45 * noise)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, 2)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Plain:
    """The public codes' chain: torchvision's transforms of PIL images."""

    def __init__(self, config: MultiCropConfig | RandomCropConfig) -> None:
        self.transforms = require_extra("torchvision.transforms", "test")
        self.config = config
        self.views: list[dict[str, Callable[[Any], Any]]]
        if isinstance(config, MultiCropConfig):
            first = self._view(config.size, config.global_scale, config.blur[0], 0.0)
            other = self._view(config.size, config.global_scale, config.blur[1], config.solarise)
            local = self._view(config.local_size, config.local_scale, config.blur[2], 0.0)
            self.views = [first, *[other] * (config.globals_ - 1), *[local] * config.local]
        else:
            self.views = [self._view(config.size, config.scale)]

    def _view(
        self, size: int, scale: tuple[float, float], blur: float = 0.0, solarise: float = 0.0
    ) -> dict[str, Callable[[Any], Any]]:
        t, config = self.transforms, self.config
        resize = t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC)
        parts = {"crop": t.Compose([resize, t.RandomHorizontalFlip(config.flip)])}
        if isinstance(config, RecolourConfig):
            low, high = config.blur_radius
            smooth = t.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(low, high))))
            invert = t.Lambda(lambda image: ImageOps.solarize(image, 128))
            jitter = t.RandomApply([t.ColorJitter(*config.jitter)], config.jitter_p)
            parts["color"] = t.Compose([jitter, t.RandomGrayscale(config.grey)])
            parts["blur"] = t.Compose([t.RandomApply([smooth], blur), t.RandomApply([invert], solarise)])
        parts["normalize"] = t.Compose([t.ToTensor(), t.Normalize(config.mean, config.std)])
        return parts

    def __call__(self, files: Sequence[bytes]) -> dict[str, float]:
        """Seconds a file, by part."""
        seconds: dict[str, float] = defaultdict(float)

        def timed(part: str, work: Callable[[Any], Any], item: Any) -> Any:
            start = time.process_time()
            made = work(item)
            seconds[part] += (time.process_time() - start) / len(files)
            return made

        for file in files:
            image = timed("decode", lambda data: Image.open(io.BytesIO(data)).convert("RGB"), file)
            for parts in self.views:
                made = image
                for part, transform in parts.items():
                    made = timed(part, transform, made)
        return seconds | {CPU: sum(seconds.values())}


class Ours:
    """The recipe's augmentation; its parts are the differences between more and less of it."""

    def __init__(self, augmentation: PictureAugmentation) -> None:
        self.whole = self.without_blur = self.without_colors = augmentation
        config = augmentation.config
        if isinstance(config, MultiCropConfig):
            here = config.model_copy(update={"device": "cpu"})
            self.whole = MultiCrop(here)
            self.without_blur = MultiCrop(here.model_copy(update={"blur": (0.0, 0.0, 0.0), "solarise": 0.0}))
            self.without_colors = MultiCrop(config.model_copy(update={"device": "model"}))
        self.rng = np.random.default_rng(0)

    def __call__(self, files: Sequence[bytes]) -> dict[str, float]:
        """Seconds a file, by part."""
        field = self.whole.config.fields[0]

        def seconds(work: Callable[[], Any]) -> float:
            start = time.process_time()
            work()
            return (time.process_time() - start) / len(files)

        def views(augmentation: PictureAugmentation) -> list[list[View]]:
            return [augmentation.train_views({field: file}, self.rng) for file in files]

        collated = PictureCollator(1)(views(self.whole))
        decode = seconds(lambda: [self.whole.pixels(file) for file in files])
        without_colors = seconds(lambda: views(self.without_colors))
        times = {"decode": decode, "crop": without_colors - decode}
        whole = without_colors
        if self.whole is not self.without_colors:
            without_blur, whole = (seconds(partial(views, one)) for one in (self.without_blur, self.whole))
            times |= {"color": without_blur - without_colors, "blur": whole - without_blur}
        normalize = seconds(lambda: self.whole.on_device(collated))
        return times | {"normalize": normalize, CPU: whole + normalize, MODEL: without_colors}


def tokenizers(recipe: Recipe, count: int) -> tuple[Callable[[], Any], Callable[[], Any] | None, float] | None:
    """Ours and open_clip's (None where it is not installed) on the texts of `count` samples (those of the conformance
    cases), and the mean tokens of a text; None for a recipe without a tower that reads CLIP's ids."""
    for name, tower in recipe.backbone.items():
        if not isinstance(tower.config, ClipTextConfig):
            continue
        augment = recipe.augment[name]
        make = Plugins.discover().conformance_cases().of(augment.cls).sample
        if make is None:
            continue
        rng, texts = np.random.default_rng(0), []
        for i in range(count):
            sample = make(augment.config, np.random.default_rng(i))
            texts += [view.data for view in augment.build().train_views({"__key__": str(i), **sample}, rng)]
        ours = ClipTokenizer(tower.config.context)
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError:
            plain = None
        else:
            other = SimpleTokenizer(context_length=tower.config.context)
            plain = partial(other, texts)
        return partial(ours, texts), plain, float((ours(texts) > 0).sum(1).float().mean())
    return None


def bench_data(
    recipe: Recipe, *, width: int, height: int, images: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows by part: median milliseconds of both a sample, and their ratio. One thread, interleaved.

    Raises `UserError` without torchvision, and for a recipe whose images are neither of `multi_crop` nor `random_crop`.
    """
    nodes = {name: node for name, node in recipe.augment.items() if node.cls in (MultiCrop, RandomCrop)}
    if not nodes:
        raise UserError("distill bench data: only multi_crop and random_crop have a plain chain to compare with")
    node = next(iter(nodes.values()))
    augmentation = node.build()
    assert isinstance(augmentation, PictureAugmentation)
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    np.random.seed(0)
    plain, ours = Plain(node.config), Ours(augmentation)
    files = [photo(width, height, seed) for seed in range(images)]
    size = sum(map(len, files)) / images / 1000
    say(f"{images} JPEGs of {width} x {height}, {size:.0f} kB; views {views_of(node.cls.shapes(node.config) or ())}")
    for joint in recipe.joint.values():
        say(f"{joint.path} ({joint.cls.name}) changes what these make, and is in neither chain")
    texts = tokenizers(recipe, images)
    measured: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    for i in range(rounds + 1):
        for side, work in (("plain", plain), ("ours", ours)) if i % 2 else (("ours", ours), ("plain", plain)):
            times = work(files)
            if texts is not None and (tokenize := texts[0] if side == "ours" else texts[1]) is not None:
                start = time.process_time()
                tokenize()
                times[TOKENIZE] = (time.process_time() - start) / images
            if i:  # the first round warms up
                measured[side].append(times)
    rows = []
    for part in measured["ours"][0]:
        a = [one[part] for one in measured["ours"]]
        b = [one[CPU if part == MODEL else part] for one in measured["plain"] if part in one or part == MODEL]
        row: dict[str, Any] = {
            "part": part,
            "ours_ms": round(statistics.median(a) * 1e3, 3),
            "plain_ms": None,
            "ratio": None,
        }
        if b:
            row["plain_ms"] = round(statistics.median(b) * 1e3, 3)
            row["ratio"] = round(statistics.median(y / x for x, y in zip(a, b, strict=True)), 2)
        rows.append(row)
        other = f"plain {row['plain_ms']:7.3f} ms   " if b else "plain (open_clip is not installed)   "
        say(f"{part:16}{other}ours {row['ours_ms']:7.3f} ms" + (f"   {row['ratio']:5.2f} x" if b else ""))
    if texts is not None:
        say(f"{TOKENIZE}: {texts[2]:.0f} tokens a text")
    return rows


def views_of(shapes: Sequence[tuple[int, ...]]) -> str:
    """`2 x 224 + 6 x 96` px."""
    return " + ".join(f"{n} x {side}" for side, n in Counter(shape[-1] for shape in shapes).items())
