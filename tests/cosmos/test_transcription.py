"""The oracle itself against facts it does not share: PyTorch's own layers, hand arithmetic, differences."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, PATCH, GRID, CONTEXT, VOCAB, DIM = 2, 4, 3, 7, 23, 6
SIZES = {"heads": HEADS, "text_heads": HEADS, "fusion_heads": HEADS, "patch": PATCH}
Weights = dict[str, Tensor]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_ids(batch: int, seed: int) -> Tensor:
    """Rows of different lengths: words, EOT (the largest id), padding 0."""
    ids = torch.randint(1, VOCAB - 1, (batch, CONTEXT), generator=torch.Generator().manual_seed(seed))
    for row in range(batch):
        end = 2 + (row + seed) % (CONTEXT - 2)
        ids[row, end], ids[row, end + 1 :] = VOCAB - 1, 0
    return ids


def make_views(batch: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """2 global and 2 local crops (smaller), 2 global and 3 local texts."""
    sizes = [PATCH * GRID] * 2 + [PATCH * 2] * 2
    images = [randn(batch, 3, size, size, seed=index) for index, size in enumerate(sizes)]
    return images, [make_ids(batch, seed) for seed in range(5)]


def run(module: ModuleType, student: Weights, teacher: Weights, **options: Any) -> dict[str, Any]:
    images, texts = make_views()
    result: dict[str, Any] = module.step(student, teacher, images, texts, **{**SIZES, **options})
    return result


@pytest.fixture(scope="module")
def student(transcription: ModuleType) -> Weights:
    weights: Weights = transcription.make_weights(1)
    return weights


@pytest.fixture(scope="module")
def teacher(transcription: ModuleType) -> Weights:
    weights: Weights = transcription.make_weights(2)
    return weights


@pytest.fixture(scope="module")
def result(transcription: ModuleType, student: Weights, teacher: Weights) -> dict[str, Any]:
    return run(transcription, student, teacher)


def multi_head(weights: Weights, name: str, width: int, heads: int) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    start = name + "."
    layer.load_state_dict({key.removeprefix(start): weights[key] for key in weights if key.startswith(start)})
    return layer


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_weights_are_not_zero_and_alike_in_every_dtype(transcription: ModuleType, student: Weights) -> None:
    for key, value in transcription.make_weights(1, torch.float32).items():
        assert value.dtype == torch.float32
        assert value.abs().mean() > 0.02, key
        assert torch.equal(value, student[key].float()), key


def test_layer_norm(transcription: ModuleType, student: Weights) -> None:
    x = 3 * randn(2, 5, 12) + 1
    weight, bias = student["visual.ln_pre.weight"], student["visual.ln_pre.bias"]
    close(transcription.layer_norm(student, "visual.ln_pre", x), F.layer_norm(x, (12,), weight, bias, 1e-5))


def test_cross_attention(transcription: ModuleType, student: Weights) -> None:
    queries, tokens, name = randn(4, 3, DIM), randn(4, 5, DIM, seed=1), "text_attn_cross_pool.attn"
    expected, _ = multi_head(student, name, DIM, 3)(queries, tokens, tokens)
    close(transcription.attention(student, name, queries, tokens, 3), expected)


def test_causal_attention(transcription: ModuleType, student: Weights) -> None:
    x, name = randn(2, CONTEXT, 8), "transformer.resblocks.0.attn"
    allowed = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    expected, _ = multi_head(student, name, 8, HEADS)(x, x, x, attn_mask=~allowed)
    close(transcription.attention(student, name, x, x, HEADS, allowed), expected)


def reference_block(weights: Weights, name: str, width: int) -> nn.TransformerEncoderLayer:
    """PyTorch's own pre-norm block with erf GELU."""
    layer = nn.TransformerEncoderLayer(
        width, HEADS, 4 * width, 0.0, "gelu", norm_first=True, batch_first=True, dtype=torch.float64
    )
    ours = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "c_fc": "linear1", "c_proj": "linear2"}
    state = {}
    for key, value in weights.items():
        if key.startswith(name + "."):
            first, _, rest = key[len(name) + 1 :].removeprefix("mlp.").partition(".")
            state[f"{ours[first]}.{rest}"] = value
    layer.load_state_dict(state)
    return layer


def test_image_encoder_against_pytorch_layers(transcription: ModuleType, student: Weights) -> None:
    x = randn(2, 3, PATCH * GRID, PATCH * GRID)
    patches = F.conv2d(x, student["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    first = student["visual.class_embedding"].expand(2, 1, -1)
    tokens = torch.cat([first, patches], dim=1) + student["visual.positional_embedding"]
    tokens = F.layer_norm(tokens, (12,), student["visual.ln_pre.weight"], student["visual.ln_pre.bias"])
    for layer in range(2):
        tokens = reference_block(student, f"visual.transformer.resblocks.{layer}", 12)(tokens)
    tokens = F.layer_norm(tokens, (12,), student["visual.ln_post.weight"], student["visual.ln_post.bias"])
    pooled, rest = transcription.encode_image(student, x, HEADS, PATCH)
    close(pooled, tokens[:, 0] @ student["visual.proj"])
    close(rest, tokens[:, 1:])


def test_text_encoder_against_pytorch_layers(transcription: ModuleType, student: Weights) -> None:
    ids = make_ids(3, 4)
    tokens = student["token_embedding.weight"][ids] + student["positional_embedding"]
    future = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
    for layer in range(2):
        tokens = reference_block(student, f"transformer.resblocks.{layer}", 8)(tokens, src_mask=future)
    tokens = F.layer_norm(tokens, (8,), student["ln_final.weight"], student["ln_final.bias"])
    pooled, all_tokens = transcription.encode_text(student, ids, HEADS)
    close(all_tokens, tokens)
    for row in range(3):
        end = ids[row].tolist().index(VOCAB - 1)
        close(pooled[row], tokens[row, end] @ student["text_projection"])


def test_text_is_causal(transcription: ModuleType, student: Weights) -> None:
    ids = make_ids(3, 0)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % (VOCAB - 1)
    _, before = transcription.encode_text(student, ids, HEADS)
    _, after = transcription.encode_text(student, changed, HEADS)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before[:, 4:] - after[:, 4:]).abs().amax(dim=-1) > 1e-6).all()


def test_pooled_text_is_read_at_the_largest_id(transcription: ModuleType, student: Weights) -> None:
    ids = torch.tensor([[5, 9, 22, 0, 0, 0, 0], [5, 9, 3, 4, 20, 1, 2]])  # the second row's largest is not 22
    pooled, tokens = transcription.encode_text(student, ids, HEADS)
    close(pooled, torch.stack([tokens[0, 2], tokens[1, 4]]) @ student["text_projection"])


@pytest.mark.parametrize(("grid", "rows", "columns"), [(14, 6, 6), (3, 2, 2), (3, 5, 5), (4, 3, 7), (7, 1, 6)])
def test_positions_against_interpolate(transcription: ModuleType, grid: int, rows: int, columns: int) -> None:
    table = randn(1 + grid * grid, 5, seed=grid)
    square = table[1:].T.reshape(1, 5, grid, grid)
    factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    expected = F.interpolate(square, scale_factor=factors, mode="bicubic")
    assert expected.shape[2:] == (rows, columns)
    resized = transcription.resize_positions(table, rows, columns)
    assert torch.equal(resized[0], table[0])
    close(resized[1:], expected[0].flatten(1).T)
    by_size = F.interpolate(square, size=(rows, columns), mode="bicubic")[0].flatten(1).T
    assert (resized[1:] - by_size).abs().max() > 1e-3  # the two conventions do differ


def test_positions_of_the_own_size_are_the_table(transcription: ModuleType) -> None:
    table = randn(10, 5)
    assert torch.equal(transcription.resize_positions(table, 3, 3), table)


def test_fusion_against_pytorch_layers(transcription: ModuleType, student: Weights) -> None:
    pooled, tokens = [3 * randn(4, DIM, seed=seed) for seed in range(3)], randn(4, 5, DIM, seed=9)
    allowed = torch.arange(5) <= torch.tensor([[0], [4], [2], [3]])
    for name in ("text_attn_cross_pool", "visual.attn_cross_pool"):
        layer = multi_head(student, name + ".attn", DIM, HEADS)
        query, key = (
            F.layer_norm(x, (DIM,), student[f"{name}.{ln}.weight"], student[f"{name}.{ln}.bias"])
            for x, ln in ((torch.stack(pooled, dim=1), "ln_q"), (tokens, "ln_k"))
        )
        for mask in (None, allowed):
            attended, _ = layer(query, key, key, key_padding_mask=None if mask is None else ~mask)
            fused = transcription.fuse(student, name, pooled, tokens, HEADS, mask)
            for view in range(3):
                close(fused[view], F.normalize(pooled[view] + attended[:, view], dim=-1))


def test_info_nce_by_hand(transcription: ModuleType) -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    # Logits 2 a b^T = [[1.2, 0], [1.6, 2]]: rows give the first two terms, columns the last two.
    terms = [math.log(1 + math.exp(x)) for x in (-1.2, -0.4, 0.4, -2.0)]
    close(transcription.info_nce(a, b, scalar(2)), scalar(sum(terms) / 4))


def test_losses_of_constants_and_of_perfect_views(transcription: ModuleType) -> None:
    """Matched unit vectors give log(1 + (B - 1) exp(-scale)), constant logits log B."""
    batch = 4
    unit = torch.eye(batch, dtype=torch.float64)
    flat = torch.full_like(unit, batch**-0.5)  # equally like every unit vector, and like itself
    chance = math.log(batch)
    sharp, sharp_distill = (math.log(1 + (batch - 1) * math.exp(-scale)) for scale in (2.0, 3.0))

    # Of 4 image views the 2 globals alone reach the contrastive loss; 1 of 5 texts is informative.
    pooled, fused = ([unit, unit, flat, flat], [unit] + [flat] * 4), ([unit] * 4, [flat] * 5)
    scales = scalar(math.log(2)), scalar(math.log(3))
    terms = transcription.losses(pooled, fused, ([unit] * 2, [unit, flat]), scales)
    contrastive = (sharp + 4 * chance) / 5
    # Fused images: sharp on teacher images, half so on teacher texts; fused texts: chance on both.
    distillation = (sharp_distill + (sharp_distill + chance) / 2 + 2 * chance) / 4
    close(terms["contrastive"], scalar(contrastive))
    close(terms["cross_modal_distillation"], scalar(distillation))
    close(terms["total"], scalar(contrastive + distillation))


def test_step_gathers_the_losses_of_its_parts(
    transcription: ModuleType, student: Weights, teacher: Weights, result: dict[str, Any]
) -> None:
    """Which tokens, pooler, scale and teacher: rebuilt here with PyTorch's layers and stacked logits."""
    images, texts = make_views()
    encoded = [transcription.encode_image(student, view, HEADS, PATCH) for view in images]
    written = [transcription.encode_text(student, view, HEADS) for view in texts]
    image_tokens, text_tokens = (
        F.linear(tokens, student[name + "_token_mapping.weight"], student[name + "_token_mapping.bias"])
        for name, tokens in (("image", encoded[0][1]), ("text", written[0][1]))
    )
    image, text = torch.stack([p for p, _ in encoded]), torch.stack([p for p, _ in written])

    def fused(name: str, pooled: Tensor, tokens: Tensor) -> Tensor:
        query, key = (
            F.layer_norm(x, (DIM,), student[f"{name}.{ln}.weight"], student[f"{name}.{ln}.bias"])
            for x, ln in ((pooled.transpose(0, 1), "ln_q"), (tokens, "ln_k"))
        )
        attended, _ = multi_head(student, name + ".attn", DIM, HEADS)(query, key, key)
        return F.normalize(pooled + attended.transpose(0, 1), dim=-1)

    def mean_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        logits = scale.exp() * torch.einsum("vbd,wcd->vwbc", a, b)
        matched = logits.diagonal(dim1=2, dim2=3)
        return ((logits.logsumexp(3) - matched) + (logits.logsumexp(2) - matched)).mean() / 2

    teacher_image = [transcription.encode_image(teacher, view, HEADS, PATCH)[0] for view in images[:2]]
    teacher_text = [transcription.encode_text(teacher, view, HEADS)[0] for view in texts[:2]]
    teachers = [F.normalize(torch.stack(pooled), dim=-1) for pooled in (teacher_image, teacher_text)]
    students = (
        fused("text_attn_cross_pool", image, text_tokens),
        fused("visual.attn_cross_pool", text, image_tokens),
    )
    contrastive = mean_nce(F.normalize(image[:2], dim=-1), F.normalize(text, dim=-1), student["logit_scale"])
    distillation = sum(mean_nce(a, b, student["distill_logit_scale"]) for a in students for b in teachers) / 4
    close(result["contrastive"], contrastive.detach())
    close(result["cross_modal_distillation"], torch.as_tensor(distillation).detach())
    close(result["total"], result["contrastive"] + result["cross_modal_distillation"])


def test_padding_reaches_the_fusion_unless_masked(
    transcription: ModuleType, student: Weights, teacher: Weights
) -> None:
    images, texts = make_views()
    padded = [view.clone() for view in texts]
    for row, end in enumerate(padded[0].argmax(dim=1).tolist()):
        padded[0][row, end + 1 :] = 3
    assert not torch.equal(padded[0], texts[0])
    for mask, same in ((True, True), (False, False)):
        options = {**SIZES, "mask_padding": mask}
        before, after = (transcription.step(student, teacher, images, view, **options) for view in (texts, padded))
        close(before["contrastive"], after["contrastive"])
        gap = (before["cross_modal_distillation"] - after["cross_modal_distillation"]).abs()
        assert (gap < 1e-12) == same


def test_the_mask_keeps_the_end_of_text(transcription: ModuleType, student: Weights, teacher: Weights) -> None:
    """Without padding the mask has nothing to hide, so it changes nothing."""
    images, texts = make_views()
    texts[0] = torch.cat([torch.full((3, CONTEXT - 1), 4), torch.full((3, 1), VOCAB - 1)], dim=1)
    masked, plain = (
        transcription.step(student, teacher, images, texts, **SIZES, mask_padding=mask) for mask in (True, False)
    )
    close(masked["total"], plain["total"], 1e-13)


def test_gradients_by_finite_differences(
    transcription: ModuleType, student: Weights, teacher: Weights, result: dict[str, Any]
) -> None:
    names = (
        "visual.positional_embedding",  # through the resizing as well
        "text_attn_cross_pool.attn.in_proj_weight",
        "distill_logit_scale",
    )
    step = 1e-5
    for seed, name in enumerate(names):
        direction = randn(*student[name].shape, seed=50 + seed)
        high, low = (
            run(transcription, {**student, name: student[name] + sign * step * direction}, teacher)["total"]
            for sign in (1, -1)
        )
        slope = (result["gradients"][name] * direction).sum()
        assert slope.abs() > 1e-4, name  # else the comparison says nothing
        torch.testing.assert_close((high - low) / (2 * step), slope, rtol=1e-6, atol=1e-9)


def test_every_parameter_has_a_gradient_but_key_biases(result: dict[str, Any]) -> None:
    for key, gradient in result["gradients"].items():
        if key.endswith("in_proj_bias"):
            query, noise, value = gradient.chunk(3)
            assert noise.abs().max() < 1e-13, key
            assert query.abs().max() > 1e-7, key
            assert value.abs().max() > 1e-7, key
        else:
            assert gradient.abs().max() > 1e-7, key


@pytest.mark.parametrize("number", [1, 7])
def test_adamw_against_pytorch(transcription: ModuleType, student: Weights, teacher: Weights, number: int) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6}
    result = run(transcription, student, teacher, **options, weight_decay=0.5, optimizer_step=number)
    parameters = {key: nn.Parameter(value.clone()) for key, value in student.items()}
    matrices, rest = ([p for p in parameters.values() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **options)
    for key, parameter in parameters.items():
        parameter.grad = result["gradients"][key]
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(number - 1.0), **zeros}
    optimizer.step()
    for key, parameter in parameters.items():
        close(result["student"][key], parameter.detach())
        assert not torch.equal(result["student"][key], student[key]), key


def test_scales_are_clamped_after_the_step(transcription: ModuleType, student: Weights, teacher: Weights) -> None:
    scales = {"logit_scale": scalar(4.7), "distill_logit_scale": scalar(-0.3)}
    after = run(transcription, {**student, **scales}, teacher, lr=1e-3)["student"]
    assert after["logit_scale"].item() == pytest.approx(math.log(100), abs=1e-12)
    assert after["distill_logit_scale"].item() == 0


@pytest.mark.parametrize("order", ["teacher_first", "optimizer_first"])
def test_teacher_moves_its_backbones_only(
    transcription: ModuleType, student: Weights, teacher: Weights, order: str
) -> None:
    result = run(transcription, student, teacher, momentum=0.75, lr=0.01, order=order)
    source = student if order == "teacher_first" else result["student"]
    still = set()
    for key, value in teacher.items():
        if torch.equal(result["teacher"][key], value):
            still.add(key)
        else:
            close(result["teacher"][key], torch.lerp(source[key], value, 0.75))
    poolers = (
        "visual.attn_cross_pool.",
        "text_attn_cross_pool.",
        "image_token_mapping.",
        "text_token_mapping.",
    )
    expected = {key for key in teacher if key.startswith(poolers)}
    assert len(expected) == 2 * 8 + 2 * 2
    assert still == expected | {"logit_scale", "distill_logit_scale"}


def test_step_is_deterministic_and_leaves_its_inputs(
    transcription: ModuleType, student: Weights, teacher: Weights, result: dict[str, Any]
) -> None:
    again = run(transcription, student, teacher)
    for part in ("gradients", "student", "teacher"):
        for key, value in result[part].items():
            assert torch.equal(value, again[part][key]), (part, key)
    for seed, weights in ((1, student), (2, teacher)):
        for key, value in transcription.make_weights(seed).items():
            assert torch.equal(value, weights[key]), key


def test_an_unknown_order_is_refused(transcription: ModuleType, student: Weights, teacher: Weights) -> None:
    with pytest.raises(ValueError, match="teacher_first"):
        run(transcription, student, teacher, order="both")
