"""The framework's COSMOS step against the independent transcription of its equations."""

import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill_core.batch import Batch, Group, Views
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_cosmos import cosmos, official

HEADS, TEXT_HEADS, FUSION_HEADS, PATCH = 2, 2, 2, 4
B, IMAGE_LOCALS, TEXT_LOCALS, CONTEXT, VOCABULARY = 5, 3, 4, 9, 49408


def recipe_text(*, mask_padding: bool, update: str, form: str = "auto") -> str:
    return f"""
augment:
  image: {{name: multi_crop, size: 12, local_size: 8, local: {IMAGE_LOCALS}}}
  text: {{name: text_crop, local: {TEXT_LOCALS}}}
backbone:
  image: {{name: vit, image_size: 12, patch: {PATCH}, width: 12, layers: 2, heads: {HEADS}, dim: 6}}
  text: {{name: clip_text, context: {CONTEXT}, vocabulary: {VOCABULARY}, width: 8, layers: 2, heads: {TEXT_HEADS},
          dim: 6}}
fusion: {{name: cross_attention, heads: {FUSION_HEADS}, mask_padding: {str(mask_padding).lower()}, form: {form}}}
loss: [{{name: contrastive}}, {{name: cross_modal_distillation}}]
teacher: {{momentum: 0.9, update: {update}}}
data: {{source: {{name: emoji}}, batch_size: {B}}}
train: {{steps: 10, optimizer: {{name: adamw, lr: 1e-3, weight_decay: 0.3}}}}
tracking: null
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def make_inputs(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [12, 12] + [8] * IMAGE_LOCALS
    images = [torch.randn(B, 3, s, s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]
    texts = []
    for _ in range(2 + TEXT_LOCALS):
        ids = torch.zeros(B, CONTEXT, dtype=torch.int64)
        for row in range(B):
            length = int(torch.randint(1, CONTEXT - 2, (1,), generator=generator))
            ids[row, 0] = VOCABULARY - 2
            ids[row, 1 : 1 + length] = torch.randint(0, VOCABULARY - 2, (length,), generator=generator)
            ids[row, 1 + length] = VOCABULARY - 1
        texts.append(ids)
    return images, texts


def as_batch(images: list[Tensor], texts: list[Tensor]) -> Batch:
    """As the collators would: groups by role, texts cut to the group's longest."""

    def text_group(ids: list[Tensor], role: str) -> Group:
        x = torch.stack(ids)
        return Group(x[..., : int(x.argmax(-1).max()) + 1], role)

    views = {
        "image": Views([Group(torch.stack(images[:2]), "global"), Group(torch.stack(images[2:]), "local")]),
        "text": Views([text_group(texts[:2], "global"), text_group(texts[2:], "local")]),
    }
    return Batch(views, [str(i) for i in range(B)])


def make_weights(transcription: ModuleType, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = transcription.make_weights(
        seed, dtype, width=12, layers=2, heads=HEADS, patch=PATCH, grid=3, text_width=8, text_layers=2,
        text_heads=TEXT_HEADS, context=CONTEXT, vocab=VOCABULARY, dim=6, fusion_heads=FUSION_HEADS,
    )  # fmt: skip
    return weights


def build(
    registry: Registry, dtype: torch.dtype, states: dict[str, dict[str, Tensor]], **options: object
) -> tuple[Recipe, Objective]:
    recipe = parse_recipe(recipe_text(**options), "parity.yaml", registry=registry)  # type: ignore[arg-type]
    objective = build_objective(recipe).to(dtype)
    official.load_state_dict(objective, states)
    return recipe, objective


def our_step(recipe: Recipe, objective: Objective, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step as the trainer does it; returns terms and gradients under public names."""
    maker = recipe.train.optimizer.build()
    named = objective.trainable([], {})
    optimizer = maker.build(maker.groups(named))
    progress = Progress(0, 10)
    outputs = objective.represent(batch, progress)
    losses = objective.losses(outputs)
    losses.total.backward()
    parameters = dict(objective.named_parameters())
    gradients = {
        key: parameters[name].grad.clone()  # type: ignore[union-attr]
        for key, name in official.public_names(objective).items()
    }
    objective.before_optimizer(progress)
    optimizer.step()
    objective.after_step(outputs, progress)
    return {**losses.terms, "total": losses.total}, gradients


def key_bias(key: str, value: Tensor) -> Tensor:
    """True for the K third of an attention's input bias, whose gradient is rounding noise alone."""
    mask = torch.zeros_like(value, dtype=torch.bool)
    if key.endswith("in_proj_bias"):
        third = value.shape[0] // 3
        mask[third : 2 * third] = True
    return mask


@pytest.mark.parametrize(
    ("update", "order"), [("before_optimizer", "teacher_first"), ("after_optimizer", "optimizer_first")]
)
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_whole_step_in_float64(
    transcription: ModuleType, registry: Registry, update: str, order: str, mask_padding: bool, form: str
) -> None:
    seed = 11
    states = {w: make_weights(transcription, seed + i, torch.float64) for i, w in enumerate(("student", "teacher"))}
    images, texts = make_inputs(seed, torch.float64)
    expected = transcription.step(
        states["student"], states["teacher"], images, texts, heads=HEADS, text_heads=TEXT_HEADS,
        fusion_heads=FUSION_HEADS, patch=PATCH, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.3,
        optimizer_step=1, momentum=0.9, order=order, mask_padding=mask_padding,
    )  # fmt: skip
    recipe, objective = build(registry, torch.float64, states, update=update, mask_padding=mask_padding, form=form)
    terms, gradients = our_step(recipe, objective, as_batch(images, texts))
    for name in ("contrastive", "cross_modal_distillation", "total"):
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-9, atol=1e-9)
    assert set(gradients) == set(expected["gradients"])
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected["gradients"][key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )
    after = official.public_state_dict(objective)
    for key, value in after["student"].items():
        exact = ~key_bias(key, value)
        torch.testing.assert_close(
            value[exact], expected["student"][key][exact], rtol=0, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )
        # Adam turns a key bias's rounding noise into a step of at most lr
        assert (value - states["student"][key]).abs().max() < 2e-3 or key.endswith("logit_scale")
    for key, value in after["teacher"].items():
        loose = 0.1 * 2e-3 if update == "after_optimizer" else 1e-9
        exact = ~key_bias(key, value)
        torch.testing.assert_close(value[exact], expected["teacher"][key][exact], rtol=0, atol=1e-9)
        torch.testing.assert_close(value, expected["teacher"][key], rtol=0, atol=loose)


def test_float32_outputs_and_gradients(transcription: ModuleType, registry: Registry) -> None:
    seed = 5
    states = {w: make_weights(transcription, seed + i, torch.float64) for i, w in enumerate(("student", "teacher"))}
    single = {w: {k: v.float() for k, v in state.items()} for w, state in states.items()}
    # the float64 transcription starts from the very values that float32 holds
    exact = {w: {k: v.double() for k, v in state.items()} for w, state in single.items()}
    images, texts = make_inputs(seed, torch.float32)
    doubles = [x.double() for x in images]
    expected = transcription.step(
        exact["student"], exact["teacher"], doubles, texts, heads=HEADS, text_heads=TEXT_HEADS,
        fusion_heads=FUSION_HEADS, patch=PATCH,
    )  # fmt: skip
    recipe, objective = build(registry, torch.float32, single, update="before_optimizer", mask_padding=False)
    batch = as_batch(images, texts)
    outputs = objective.represent(batch, Progress(0, 10))
    for modality, encode in (("image", "encode_image"), ("text", "encode_text")):
        for i, x in enumerate(doubles if modality == "image" else texts):
            arguments = (HEADS, PATCH) if modality == "image" else (TEXT_HEADS,)
            pooled, _ = getattr(transcription, encode)(exact["student"], x, *arguments)
            pooled = pooled / pooled.norm(dim=-1, keepdim=True)
            ours = outputs.student[modality].embedding[i]
            torch.testing.assert_close(ours.double(), pooled, rtol=0, atol=1e-6)
    terms, gradients = our_step(recipe, objective, batch)
    for name in ("contrastive", "cross_modal_distillation", "total"):
        torch.testing.assert_close(terms[name].double(), expected[name], rtol=1e-6, atol=1e-6)
    for key, gradient in gradients.items():
        noise = key_bias(key, gradient)
        reference = expected["gradients"][key]
        error = (gradient.double() - reference)[~noise].norm() / reference[~noise].norm()
        assert error < 1e-5, (key, error)
        assert (gradient[noise].abs() < 1e-6).all(), key


@pytest.mark.parametrize("mask_padding", [False, True])
def test_the_page_is_the_same_step(transcription: ModuleType, mask_padding: bool) -> None:
    """`distill_cosmos/cosmos.py`, which is to be read first: losses, gradients and the teacher are the transcription's.

    Catches a page that says another method than COSMOS, which the comparison with the framework alone would not."""
    states = {w: make_weights(transcription, 7 + i, torch.float32) for i, w in enumerate(("student", "teacher"))}
    exact = {w: {key: value.double() for key, value in state.items()} for w, state in states.items()}
    images, texts = make_inputs(7, torch.float32)
    expected = transcription.step(
        exact["student"], exact["teacher"], [x.double() for x in images], texts, heads=HEADS, text_heads=TEXT_HEADS,
        fusion_heads=FUSION_HEADS, patch=PATCH, momentum=0.9, order="teacher_first", mask_padding=mask_padding,
    )  # fmt: skip
    vit = SimpleNamespace(image_size=12, patch=PATCH, width=12, layers=2, heads=HEADS, mlp_ratio=4.0, dim=6)
    text = SimpleNamespace(
        context=CONTEXT, vocabulary=VOCABULARY, width=8, layers=2, heads=TEXT_HEADS, mlp_ratio=4.0, dim=6
    )
    student, teacher = (cosmos.Cosmos(vit, text, FUSION_HEADS) for _ in range(2))
    student.load_state_dict(states["student"])
    teacher.load_state_dict(states["teacher"])
    views = [cosmos.Views(x[:2], x[2:]) for x in (images, texts)]
    terms = cosmos.losses(student, teacher, *views, text_length=CONTEXT, mask_padding=mask_padding)
    sum(terms.values()).backward()
    for name, term in terms.items():
        torch.testing.assert_close(term.double(), expected[name], rtol=1e-5, atol=1e-6)
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    assert set(gradients) == set(expected["gradients"])
    for key, gradient in gradients.items():
        reference, noise = expected["gradients"][key], key_bias(key, gradient)
        error = (gradient.double() - reference)[~noise].norm() / reference[~noise].norm()
        assert error < 1e-5, (key, error)
    cosmos.update(student, teacher, torch.optim.SGD(student.parameters(), lr=1e6), momentum=0.9)
    for key, value in teacher.named_parameters():
        if not re.search(r"attn_cross_pool|token_mapping|logit_scale", key):  # a teacher's towers alone are used
            torch.testing.assert_close(value.double(), expected["teacher"][key], rtol=1e-6, atol=1e-6)
    for scale in (student.logit_scale, student.distill_logit_scale):
        assert 0 <= scale.item() <= math.log(100) + 1e-6


def test_the_page_is_one_page() -> None:
    """It is torch alone, so that nothing else has to be read to read it, and stays short."""
    source = Path(cosmos.__file__).read_text(encoding="utf-8")
    modules = re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE)
    assert {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names} == {
        "torch", "torch.nn.functional",
    }  # fmt: skip
    assert len(source.splitlines()) < 200
