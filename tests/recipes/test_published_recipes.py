"""`recipes/published`: each validates, says the published numbers, and takes a step on the embedded data."""

from __future__ import annotations

import gc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from other_runs import stand_ins

from distill_core.data.lengths import measure
from distill_core.data.loader import Loader
from distill_core.data.shard import PATIENCE
from distill_core.data.tar_shards import expand
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.step import TrainStep
from distill_core.system.process import seed_all

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "published").glob("*.yaml"))
COSMOS = [ROOT / "recipes" / "cosmos_vitb16.yaml", *(file for file in FILES if file.stem.startswith("cosmos"))]

PAIRS = {
    "cc3m": 2_823_019,
    "cc12m": 10_010_225,
    "yfcc15m": 14_065_827,
    "merged30m": 26_899_071,
    "pixelprose": 15_037_386,
    "datacomp12m": 12_800_000,
}
SHARDS = {
    "cc3m": 576,
    "cc12m": 2176,
    "yfcc15m": 3637,
    "merged30m": 3637 + 2176 + 575,
    "pixelprose": 1700,
    "datacomp12m": 1024,
}
IMAGENET = 1_281_167
METHODS = {
    "clip_vitb16": tuple(PAIRS)[:5],
    "cosmos_vitb16": ("cc12m", "yfcc15m", "merged30m", "pixelprose"),
    "cosmos_vitb32": tuple(PAIRS)[:5],
    "dreamlip_vitb16": ("cc3m", "cc12m", "yfcc15m", "merged30m"),
    "flair_vitb16": ("cc3m", "cc12m", "yfcc15m", "merged30m"),
    "slip_vitb16": ("cc3m", "cc12m", "yfcc15m"),
    **dict.fromkeys(("dino_vits16", "dino_vitb16", "ibot_vits16", "ibot_vitb16"), ("imagenet",)),
    "mobileclip_vitb16": ("datacomp12m",),
}
UNNAMED = {
    # recipe: ranks, batch, samples of the run, lr, weight decay, betas
    "siglip_vitb16": (32, 32_768, 9e9, 1e-3, 0.1, [0.9, 0.95]),
    "silc_vitb16": (64, 16_384, 20e9, 1e-3, 0.1, [0.9, 0.98]),
    "tips_vitb14": (64, 16_384, 70 * 117e6, 5e-4, 0.01, [0.9, 0.98]),
    "tips2_vitb14": (64, 8192, 90_000 * 8192, 5e-4, 0.01, [0.9, 0.98]),
    "flava_vitb16": (64, 8192, 150_000 * 8192, 1e-3, 0.1, [0.9, 0.999]),
}
"""Those whose data the user names: they are not public, or in no shards that are."""
ALONE = [file for file in FILES if file.stem.endswith("imagenet")]
PAIRED = [file for file in FILES if file not in ALONE and file.stem not in UNNAMED]
"""On DreamLIP's and PixelProse's shards."""


def test_every_published_setting_is_there() -> None:
    named = {f"{method}_{data}" for method in METHODS for data in METHODS[method]}
    assert {file.stem for file in FILES} == named | UNNAMED.keys()


@pytest.mark.parametrize("name", UNNAMED)
def test_a_recipe_of_data_that_the_user_names(name: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numbers that were changed in the file or its command alone, and views or towers of another method."""
    monkeypatch.setenv("PAIRS", "/shards/train-{0000..0099}.tar")
    file = ROOT / "recipes" / "published" / f"{name}.yaml"
    ranks, batch, samples, lr, weight_decay, betas = UNNAMED[name]
    text = file.read_text(encoding="utf-8")
    recipe = load_recipe(file, registry=registry)
    resolved: dict[str, Any] = recipe.to_dict()
    assert f"distill run {name} --nproc {ranks}\n" in text
    assert f"# A batch of {batch:,} is {ranks} ranks of {batch // ranks}:" in text
    assert f"R ranks set data.batch_size to {batch} / R" in text
    assert (ranks * resolved["data"]["batch_size"], resolved["data"]["workers"]) == (batch, 16)
    assert len(expand(resolved["data"]["source"]["urls"])) == 100
    train, optimizer = resolved["train"], resolved["train"]["optimizer"]
    assert train["steps"] * batch == pytest.approx(samples, abs=batch)
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["betas"]) == (lr, weight_decay, betas)
    image, crops = resolved["backbone"]["image"], resolved["augment"]["image"]
    assert (image["width"], image["layers"], image["heads"]) == (768, 12, 12)
    assert image["patch"] == int(name.partition("vitb")[2])
    assert image["pooling"] == ("attention" if name.startswith("siglip") else "class_token")
    if name.startswith("siglip"):
        assert resolved["backbone"]["text"]["context"] == 16
    if name.startswith("silc"):
        assert (crops["global"], crops["local"], crops["size"], crops["local_size"]) == (2, 8, 256, 96)
        assert resolved["teacher"]["momentum"] == 0.966
    if name.startswith("tips"):
        assert (crops["global"], crops["local"], crops["masked"]) == (1, 6, 1)
        assert (crops["size"], crops["local_size"], crops["mean"], crops["std"]) == (224, 98, [0.0] * 3, [1.0] * 3)
        assert (image["class_tokens"], image["masking"]["ratio"], crops["recolour"]) == (2, [0.75, 0.75], False)
        assert [loss.config.weight.value(Progress(0, 1)) for loss in recipe.loss] == [1, 1, 2]
    if name.startswith("flava"):
        assert round(image["masking"]["ratio"][0] * 196) == round(image["masking"]["ratio"][1] * 196) == 75
        assert (resolved["backbone"]["text"]["masking"]["share"], resolved["fusion"]["layers"]) == (0.15, 6)


def test_siglips_weight_decay_is_that_of_big_vision(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches its 1e-4 taken over as it stands: there it is added to the rate times the update, so that only the
    schedule multiplies it; in AdamW the rate does, too."""
    monkeypatch.setenv("PAIRS", "/shards/train-{0000..0099}.tar")
    recipe = load_recipe(ROOT / "recipes" / "published" / "siglip_vitb16.yaml", registry=registry)
    maker, schedule, weight = recipe.train.optimizer.build(), 0.5, torch.nn.Parameter(torch.ones(2, 3))
    optimizer = maker.build(maker.groups([("weight", weight, 1.0)]))
    optimizer.param_groups[0]["lr"] *= schedule
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    update, rate, decay = torch.zeros(2, 3), 1e-3, 1e-4
    expected = torch.ones(2, 3) - schedule * (rate * update + decay * torch.ones(2, 3))
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("file", [COSMOS[0], *PAIRED], ids=lambda file: file.stem)
def test_a_recipe_validates_and_says_the_published_numbers(
    file: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one file of a family that was not changed with the others, and a command that names another file."""
    data = file.stem.partition("_")[2].partition("_")[2] or "cc3m"
    for name in ("CC3M", "CC12M", "YFCC15M", "PIXELPROSE", "DATACOMP", "OPENAI_L14", "DATACOMP_L14"):
        monkeypatch.setenv(name, "/shards")
    text = file.read_text(encoding="utf-8")
    resolved: dict[str, Any] = load_recipe(file, registry=registry).to_dict()
    ranks = 8
    assert f"distill run {file.stem} --nproc {ranks}\n" in text
    batch = ranks * resolved["data"]["batch_size"]
    source, train = resolved["data"]["source"], resolved["train"]
    pairs = 27_000_000 if file.stem == "flair_vitb16_merged30m" else PAIRS[data]
    assert f"# the paper's: {pairs:,} pairs\n" in text
    urls = source["urls"] if isinstance(source["urls"], list) else [source["urls"]]
    assert sum(len(expand(pattern)) for pattern in urls) == SHARDS[data]
    assert f"R ranks set data.batch_size to {batch} / R" in text
    assert resolved["data"]["workers"] == (4 if file.stem.startswith("mobileclip") else 16)
    optimizer = train["optimizer"]
    if file.stem.startswith(("cosmos", "clip")):
        assert batch == (1024 if data == "cc3m" else 4096)
        assert (train["epochs"], optimizer["lr"], optimizer["weight_decay"], optimizer["eps"]) == (32, 5e-4, 0.5, 1e-8)
        assert (optimizer["betas"], train["schedule"]["warmup"]) == ([0.9, 0.98], 2000)
    if file.stem.startswith("cosmos"):
        assert resolved["teacher"]["momentum"] == (0.999 if data == "cc3m" else 0.99)
        assert resolved["backbone"]["image"]["patch"] == int(file.stem.partition("vitb")[2][:2])
        image, words = resolved["augment"]["image"], resolved["augment"]["text"]
        assert (image["global"], image["local"], image["global_scale"]) == (2, 6, [0.4, 1.0])
        assert (words["global"], words["local"]) == (2, 6)
    if file.stem.startswith("flair"):
        assert batch == {"cc3m": 1024, "merged30m": 4096}.get(data, 6144)
        assert resolved["augment"]["text"]["captions"] == (8 if data in ("cc3m", "cc12m") else 10)
        assert resolved["loss"][0]["temperature"] == 0.07
    if file.stem.startswith("dreamlip"):
        assert batch == (1024 if data == "cc3m" else 4096)
        assert (train["epochs"], optimizer["lr"], optimizer["weight_decay"], optimizer["eps"]) == (32, 5e-4, 0.2, 1e-6)
        assert (resolved["augment"]["text"]["count"], resolved["augment"]["text"]["always"]) == (7, ["raw"])
    if file.stem.startswith("slip"):
        epochs = {"yfcc15m": 25, "cc3m": 40, "cc12m": 35}[data]
        assert (batch, train["epochs"], optimizer["lr"], optimizer["weight_decay"]) == (4096, epochs, 3e-3, 0.1)
        assert train["schedule"]["warmup"] == pytest.approx(1 / epochs, abs=1e-4)
        assert train["schedule"]["final"] * 3e-3 == pytest.approx(1e-5, rel=1e-3)
    if file.stem.startswith("mobileclip"):
        assert (batch, train["steps"], optimizer["lr"], optimizer["weight_decay"]) == (8192, 30_000, 1e-3, 0.2)
        assert (optimizer["betas"], optimizer["eps"], train["schedule"]["warmup"]) == ([0.9, 0.95], 1e-6, 1000)
        loss = resolved["loss"][0]
        assert (loss["mix"], loss["members"], loss["teacher_temperatures"]) == (1.0, [768, 768], [0.01])


PUBLIC = {
    # epochs, of the temperature's rise, of frozen prototypes; lr of 256, least lr, clipping; crops; K, lengths fixed
    "dino_vits16": (300, 30, 1, 5e-4, 1e-6, 3.0, (0.4, 8), (65536, False)),
    "dino_vitb16": (400, 50, 3, 7.5e-4, 2e-6, 0.3, (0.25, 10), (65536, True)),
    "ibot_vits16": (800, 30, 1, 5e-4, 1e-6, 3.0, (0.25, 10), (8192, False)),
    "ibot_vitb16": (400, 50, 3, 7.5e-4, 2e-6, 0.3, (0.32, 10), (8192, True)),
}
"""As the flags of main_dino.py and main_ibot.py have them."""


@pytest.mark.parametrize("file", ALONE, ids=lambda file: file.stem)
def test_dino_and_ibot_say_the_published_numbers(
    file: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a number of the other size, and a share of the run that is of another length."""
    monkeypatch.setenv("IMAGENET", "/imagenet")
    epochs, rise, frozen, lr, least, clip, (area, local), head = PUBLIC[file.stem.removesuffix("_imagenet")]
    text, recipe = file.read_text(encoding="utf-8"), load_recipe(file, registry=registry)
    resolved: dict[str, Any] = recipe.to_dict()
    train, loss, tower = resolved["train"], resolved["loss"][0], resolved["backbone"]["image"]
    assert f"distill run {file.stem} --nproc 8\n" in text
    assert f"# the paper's: {IMAGENET:,} images\n" in text
    batch = 8 * resolved["data"]["batch_size"]
    assert (batch, train["epochs"]) == (1024, epochs)
    assert f"R ranks set data.batch_size to {batch} / R" in text
    optimizer = train["optimizer"]
    assert (optimizer["lr"], optimizer["betas"]) == (pytest.approx(lr * batch / 256), [0.9, 0.999])
    assert train["schedule"]["warmup"] == pytest.approx(10 / epochs, rel=1e-4)
    assert train["schedule"]["final"] * optimizer["lr"] == pytest.approx(least, rel=1e-4)
    assert train["clip_grad"] == {"by": "parameter", "max": clip}
    steps = epochs * IMAGENET // batch
    for schedule, (first, last) in (
        (recipe.train.optimizer.config.weight_decay, (0.04, 0.4)),
        (recipe.teacher.config.momentum, (0.996, 1.0)),  # type: ignore[union-attr]
    ):
        values = [schedule.value(Progress(step, steps)) for step in (0, steps // 2, steps - 1)]
        assert values == pytest.approx([first, (first + last) / 2, last], abs=1e-4)
    temperature = recipe.loss[0].config.teacher_temperature
    values = [
        temperature.value(Progress(round(of * steps), steps)) for of in (0, rise / 2 / epochs, rise / epochs, 0.9)
    ]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07], abs=1e-4)
    assert loss["freeze_last_layer"] * epochs == pytest.approx(frozen, rel=1e-4)
    assert (loss["prototypes"], loss["norm_last_layer"]) == head
    assert (loss["hidden"], loss["bottleneck"], loss["student_temperature"]) == (2048, 256, 0.1)
    image = resolved["augment"]["image"]
    assert (image["global"], image["local"], image["global_scale"], image["local_scale"]) == (
        2, local, [area, 1.0], [0.05, area],
    )  # fmt: skip
    assert (image["jitter"], image["jitter_p"], image["grey"]) == ([0.4, 0.4, 0.2, 0.1], 0.8, 0.2)
    assert (image["blur"], image["solarise"]) == ([1.0, 0.1, 0.5], 0.2)
    assert (tower["drop_path"], tower["initialization"], tower["patch"]) == (0.1, "trunc_normal", 16)
    assert (tower["width"], tower["heads"]) == ((384, 6) if "vits16" in file.stem else (768, 12))
    assert (tower["masking"] is not None) == file.stem.startswith("ibot")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def embedded(file: Path) -> list[str]:
    """What a recipe needs for the emoji's captions, and for a first step that moves DINO's prototypes."""
    method = file.stem.partition("_")[0]
    captions = {
        "dreamlip": ["augment.text.always=[name]"],
        "tips": ["augment.text.web=name"],
        "tips2": ["augment.text.web=name", "augment.text.synthetic=[{}]"],
    }
    heads = {"silc": ("dino",), "tips": ("dino", "ibot"), "tips2": ("dino", "ibot")}.get(method, ())
    return [
        *captions.get(method, ["augment.text.fields=null"] if file not in ALONE else []),
        *(f"loss.{head}.freeze_last_layer=0" for head in heads),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_step_on_the_embedded_data(file: Path, registry: Registry, cache: Path) -> None:
    """Towers at their published size, crops and captions at theirs; a batch of 2 in the recipe's precision."""
    overrides = [
        "train.steps=1", "data.batch_size=2", "data.workers=0", "data.shuffle=1", *embedded(file),
        f"data.source={{name: emoji, limit: 60, shards: 1, size: 64, cache: {cache}}}",
    ]  # fmt: skip
    if file.stem.startswith("mobileclip"):  # its data have no syn.json, and its teachers' weights are not here
        overrides += ["augment.text={name: two_captions, web: name}", *stand_ins(file)]
    recipe = load_recipe(file, registry=registry, overrides=overrides, allow_unset=True)
    source = recipe.data.source.build()
    source.prepare()
    shards = [shard for names in source.sets("train").values() for shard in names]
    (batch,) = islice(Loader(recipe, shards, measure(shards, PATIENCE)), 1)
    assert (len(batch), batch.skipped) == (2, [])
    seed_all(recipe.seed)
    objective = build_objective(recipe)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    step = TrainStep(recipe, objective, torch.device("cpu"))(batch, Progress(0, 1))
    assert step.finite
    assert step.loss > 0
    # biases before a batch norm, and those of keys, have no gradient
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad and p.ndim > 1}
    # of images alone nobody reads the embedding, and the first step has frozen prototypes
    still = [] if file not in ALONE else ["backbone.image.proj", f"loss.{file.stem.partition('_')[0]}.head.last_layer"]
    assert [name for name, parameter in trained.items() if torch.equal(parameter, before[name])] == still
    del objective, before, trained, step
    gc.collect()
