"""TIPS: each caption meets its own class token; the loss is that of plain loops, on one rank and on two."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from beside import load_beside
from launching import of_ranks

from distill_core.errors import BadSample, RecipeErrors
from distill_core.outputs import Progress
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_tips.captions import TwoCaptions, TwoCaptionsConfig
from distill_vl.multi_crop import MultiCrop, MultiCropConfig

SCRIPT = Path(__file__).with_name("steps.py")


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return load_beside(__file__, "steps")


def info_nce(a: list[list[float]], b: list[list[float]], scale: float) -> float:
    """Mean of the two cross-entropies whose targets stand on the diagonal, of cosines times the scale."""

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    logits = [[scale * cosine(x, y) for y in b] for x in a]
    total = 0.0
    for i in range(len(a)):
        row = sum(math.exp(x) for x in logits[i])
        column = sum(math.exp(other[i]) for other in logits)
        total += (math.log(row) + math.log(column)) / 2 - logits[i][i]
    return total / len(a)


def test_two_token_contrastive(steps: ModuleType) -> None:
    """Catches captions that are swapped, one class token for both, a local crop, and a projection that is not used."""
    made = steps.objective()
    outputs = made.represent(steps.batch(), Progress(0, 1))
    losses = made.losses(outputs)
    loss, features = made.loss["two_token_contrastive"], outputs.student["image"]
    web, synthetic = (view.tolist() for view in outputs.student["text"].pooled)
    scale = math.exp(math.log(1 / 0.07))
    projected = features.class_tokens[:, :, 1] @ loss.projection
    first = sum(info_nce(features.pooled[v].tolist(), web, scale) for v in range(2)) / 2
    second = sum(info_nce(projected[v].tolist(), synthetic, scale) for v in range(2)) / 2
    # 1 / 0.07 is held in fp32, as a parameter starts
    assert losses.terms["two_token_contrastive"].item() == pytest.approx((first + second) / 2, rel=1e-7)
    with torch.no_grad():
        loss.logit_scale.fill_(math.log(9.0))
    scale = 9.0
    first = sum(info_nce(features.pooled[v].tolist(), web, scale) for v in range(2)) / 2
    second = sum(info_nce(projected[v].tolist(), synthetic, scale) for v in range(2)) / 2
    losses = made.losses(outputs)
    assert losses.terms["two_token_contrastive"].item() == pytest.approx((first + second) / 2, rel=1e-10)
    assert losses.metrics["two_token_contrastive/web"].item() == pytest.approx(first, rel=1e-10)
    assert losses.metrics["two_token_contrastive/synthetic"].item() == pytest.approx(second, rel=1e-10)
    assert abs(first - second) > 1e-3
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    loss.after_step(outputs, Progress(0, 1))
    assert loss.logit_scale.item() == pytest.approx(math.log(100.0))


@pytest.mark.slow
def test_two_ranks_have_the_joint_batchs_gradients(tmp_path: Path, steps: ModuleType) -> None:
    """Catches negatives of one rank alone, of either caption."""
    ranks = of_ranks(2, SCRIPT, tmp_path)
    joint = steps.step(0, steps.SAMPLES)
    torch.testing.assert_close((ranks[0]["term"] + ranks[1]["term"]) / 2, joint["term"], rtol=1e-10, atol=1e-10)
    assert "loss.two_token_contrastive.projection" in joint["gradients"]
    for name, gradient in joint["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    alone = steps.step(0, steps.SAMPLES // 2)["gradients"]["loss.two_token_contrastive.projection"]
    assert (alone - joint["gradients"]["loss.two_token_contrastive.projection"]).abs().max() > 1e-4


def told(**fields: object) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def texts_of(sample: dict[str, bytes], **options: object) -> list[str]:
    views = TwoCaptions(TwoCaptionsConfig.model_validate(options)).train_views(sample, np.random.default_rng(0))
    assert tuple(view.role for view in views) == TwoCaptions.roles(TwoCaptionsConfig())
    return [view.data for view in views]


def test_the_webs_caption_is_the_whole_one_of_its_field() -> None:
    """Its first sentence was taken for it, and the rest for the synthetic caption."""
    dreamlip = told(raw_caption="Cat. On a mat, 3.5 m", shortIB_captions=["one. two."], longLLA_captions="three")
    assert texts_of(dreamlip) == ["Cat. On a mat, 3.5 m", "one. two. three"]
    assert texts_of(told(original_caption="Cat. On a mat", caption="A cat. It sits.")) == [
        "Cat. On a mat", "A cat. It sits",
    ]  # fmt: skip
    emoji = told(captions=["cat", "a picture of a cat", "it meows"], name="cat")
    assert texts_of(emoji, web="name") == ["cat", "a picture of a cat. it meows"]
    assert texts_of(told(captions=["it meows"], alt="Cat"), web="alt") == ["Cat", "it meows"]


@pytest.mark.parametrize(
    ("sample", "options", "reason"),
    [
        (told(captions=["a cat", "it sits"]), {}, "no caption of the web: neither raw_caption nor original_caption"),
        ({"txt": b"A cat. It sits."}, {}, "name the json's field that holds it by the option `web`"),
        (told(captions=["a cat"]), {"web": "name"}, "no text in the field 'name'"),
        (told(raw_caption="web"), {}, "no synthetic caption beside the web's"),
        (told(longIB_captions=["one"]), {}, "no caption of the web"),
        (
            told(raw_caption="web", longIB_captions=["one"]),
            {"synthetic": ({"fields": ("short",)}, {"fields": ("long",)})},
            "no synthetic caption beside the web's in the fields short",
        ),
    ],
)
def test_a_sample_without_one_of_the_two_is_bad(
    sample: dict[str, bytes], options: dict[str, object], reason: str
) -> None:
    with pytest.raises(BadSample, match=reason):
        texts_of(sample, **options)


def test_synthetic_sentences_are_drawn_and_stay_in_order() -> None:
    drawn = TwoCaptions(TwoCaptionsConfig.model_validate({"synthetic": ({"sentences": 3},)}))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        first, second = drawn.train_views(told(raw_caption="web", longIB_captions=[f"s {i}" for i in range(5)]), rng)
        parts = [int(part.removeprefix("s ")) for part in second.data.split(". ")]
        assert first.data == "web"
        assert len(parts) == 3
        assert parts == sorted(set(parts))
        seen.add(tuple(parts))
    assert len(seen) == 10, "all of the choices of 3 of 5"


def test_one_of_several_synthetic_captions_is_drawn_at_a_time() -> None:
    """TIPSv2's: catches captions that are joined, one that is drawn more often, and one that the web's slips into."""
    sample = told(raw_caption="web", shortIB_captions=["s0"], shortSV_captions=["s1"], longIB_captions=["l0. l1"])
    config = {"synthetic": ({"fields": ("short",), "sentences": 1}, {"fields": ("longIB_captions",)})}
    augment = TwoCaptions(TwoCaptionsConfig.model_validate(config))
    rng = np.random.default_rng(0)
    seen = Counter(tuple(view.data for view in augment.train_views(sample, rng)) for _ in range(2000))
    assert seen.keys() == {("web", "s0"), ("web", "s1"), ("web", "l0. l1")}
    assert seen["web", "l0. l1"] == pytest.approx(1000, abs=90)  # 4 standard deviations
    assert seen["web", "s0"] == pytest.approx(500, abs=80)


def test_masked_copies_are_the_global_crops() -> None:
    """Catches a copy that is cropped or coloured anew, and copies that change what other views are drawn."""
    picture = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    from PIL import Image

    def views(**more: int) -> list[torch.Tensor]:
        config = MultiCropConfig(size=16, local_size=8, local=2, **{"global": 2}, **more)  # type: ignore[arg-type]
        augment = MultiCrop(config)
        augment.item = lambda sample, field=None: Image.fromarray(picture)  # type: ignore[method-assign]
        found = augment.train_views({}, np.random.default_rng(7))
        assert tuple(view.role for view in found) == MultiCrop.roles(config)
        return [view.data for view in found]

    plain, copied = views(), views(masked=1)
    assert len(copied) == len(plain) + 1
    assert all(torch.equal(a, b) for a, b in zip(plain, copied, strict=False))
    assert torch.equal(copied[-1], copied[0])
    with pytest.raises(ValueError, match="masked 3 is more than global 2"):
        views(masked=3)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("class_tokens: 2", "class_tokens: 1", "needs 2 class tokens of 'image'; its backbone gives 1"),
        ("name: two_captions", "name: caption", r"needs 2 global view\(s\) of 'text'; its augmentation makes 1"),
        ("dim: 6}\nloss", "dim: 8}\nloss", "compares embeddings of one width D"),
        ("[{name: two", "[{modalities: [image, words], name: two", "needs a modality 'words'"),
    ],
)
def test_needs(steps: ModuleType, registry: Registry, old: str, new: str, line: str) -> None:
    parse_recipe(steps.RECIPE, "r.yaml", registry=registry)
    assert old in steps.RECIPE
    with pytest.raises(RecipeErrors, match=line):
        parse_recipe(steps.RECIPE.replace(old, new), "r.yaml", registry=registry)
