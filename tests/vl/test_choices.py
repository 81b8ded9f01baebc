"""Which backends a recipe's step takes on a GPU that is not here, and why the others are passed over."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from other_runs import stand_ins

from distill_core.errors import UserError
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_kernels import dispatch, machine
from distill_kernels.attention import memory_efficient
from distill_kernels.attention.cross_attention import CrossAttentionInputs
from distill_kernels.attention.packed_attention import PackedInputs
from distill_kernels.attention.self_attention import SelfAttention
from distill_kernels.choices import Choice
from distill_vl.choices import choices_of
from distill_vl.commands import kernels

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with Triton, a compiler, and an xformers that was for another CUDA."""
    monkeypatch.setattr(machine, "interpreting", lambda: False)
    monkeypatch.setattr(machine, "why_not_installed", lambda package: None)
    monkeypatch.setattr(machine, "_why_not_compile", lambda: None)
    monkeypatch.setattr(memory_efficient, "why_not_built", lambda: "for another CUDA")


def choices(registry: Registry, name: str, *overrides: str, device: torch.device = CUDA) -> list[Choice]:
    """With few samples; ViT-B itself."""
    recipe = load_recipe(
        RECIPES / f"{name}.yaml", registry=registry, overrides=["data.batch_size=4", *overrides], allow_unset=True
    )
    return choices_of(recipe, device)


def taken(made: list[Choice]) -> Counter[tuple[str, str]]:
    return Counter((choice.op, choice.backend) for choice in made)


@pytest.mark.slow
def test_flagship_on_a_gpu(registry: Registry) -> None:
    """COSMOS ViT-B/16: every op of a step runs a kernel that was meant for a GPU."""
    made = choices(registry, "cosmos_vitb16")
    assert taken(made) == {
        ("packed_attention", "varlen"): 12 + 12 + 11,  # teacher's texts, student's texts, student's crops
        ("self_attention", "sdpa"): 11 + 1,  # teacher's crops; the student's crop whose tokens are read
        # class tokens of the teacher's crops, the student's locals, its other global; the fusion's two directions
        ("cross_attention_pool", "projected"): 5,
        ("cross_attention", "triton"): 5,
        ("multi_view_info_nce", "triton"): 2,
    }
    packed = {c.inputs.split("causal=")[1] for c in made if c.op == "packed_attention"}
    assert packed == {"1 train=0", "1 train=1", "0 train=1"}
    pools = [c.inputs for c in made if c.op == "cross_attention_pool"]
    assert [inputs.split(" ", 1)[0] for inputs in pools] == ["dtype=bfloat16"] * 5
    assert [inputs.split("B=3..4 ")[1] for inputs in pools[-2:]] == [
        "L=65..128 D=512 H=8 train=1",
        "L=129..256 D=512 H=8 train=1",
    ]
    losses = [c.inputs for c in made if c.op == "multi_view_info_nce"]
    assert losses == ["dtype=float32 Va=2 Vb=8 B=4 M=4 D=512", "dtype=float32 Va=16 Vb=4 B=4 M=4 D=512"]

    why = {(c.op, name): reason for c in made for name, reason in c.others}
    assert why["cross_attention_pool", "absorbed"] == "after projected in the order"
    assert why["cross_attention", "sdpa"] == "after triton in the order"
    assert why["cross_attention", "xformers"] == "for another CUDA"
    assert why["packed_attention", "loop"] == "only when named"
    assert why["multi_view_info_nce", "chunked"] == "after triton in the order"
    assert all(c.why.startswith("estimated") for c in made)


@pytest.mark.slow
def test_losses_without_tensor_cores(registry: Registry) -> None:
    """The recipe's matmul_precision decides, and is left as it was found."""
    before = torch.backends.cuda.matmul.allow_tf32
    made = choices(registry, "cosmos_tiny", "train.matmul_precision=highest")
    assert taken(made)["multi_view_info_nce", "chunked"] == 2
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_sigmoid_loss(registry: Registry) -> None:
    one_layer = ["backbone.image.layers=1", "backbone.text.layers=1"]
    assert taken(choices(registry, "cosmos_sigmoid_tiny", *one_layer))["multi_view_sigmoid", "triton"] == 2


def test_each_stage_is_asked(registry: Registry) -> None:
    """Catches ops of a later stage alone, which `distill kernels --tune` would not time."""
    changes = ["backbone.image.layers=1", "backbone.text.layers=1", "stages=[{at: 0.5, set: {loss.1: {name: clip}}}]"]
    made = taken(choices(registry, "siglip_tiny", *changes))
    assert made["multi_view_sigmoid", "triton"] == 2
    assert made["multi_view_info_nce", "triton"] == 1


@pytest.mark.slow
def test_fp32_on_a_gpu(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's packed flash kernel takes no fp32: xformers' is next, where it loads."""
    made = choices(registry, "cosmos_tiny", "train.precision=fp32")
    assert taken(made)["packed_attention", "grouped"] == 7
    why = {(c.op, name): reason for c in made for name, reason in c.others}
    assert why["packed_attention", "varlen"] == "takes float16 or bfloat16, got torch.float32"
    assert why["packed_attention", "xformers"] == "for another CUDA"
    monkeypatch.setattr(memory_efficient, "why_not_here", lambda q: None if q is None or q.is_cuda else "on a CPU")
    monkeypatch.setattr(memory_efficient, "why_not_kernel", lambda call: None)
    for inputs in (PackedInputs, SelfAttention, CrossAttentionInputs):
        monkeypatch.setattr(sys.modules[inputs.__module__], "_xformers_call", lambda x: None)
    made = choices(registry, "cosmos_tiny", "train.precision=fp32")
    assert taken(made)["packed_attention", "xformers"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml") if "vitb16" not in path.stem))
def test_every_recipe_can_be_asked(registry: Registry, name: str) -> None:
    instead = stand_ins(RECIPES / name)
    made = choices(registry, name, *instead)
    assert {c.op for c in made} <= set(dispatch.OPS)
    # The kernels take the widths of every recipe.
    written = {"cross_attention", "multi_view_info_nce", "multi_view_sigmoid"}
    assert {c.backend for c in made if c.op in written} <= {"triton"}
    assert choices(registry, name, *instead, device=torch.device("cpu"))
    if instead:
        with pytest.raises(UserError, match=r"the teacher 'default' is '(ensemble|frozen)'"):
            choices(registry, name)


@pytest.mark.slow
def test_on_a_cpu_the_choices_are_those_that_run(registry: Registry) -> None:
    made = choices(registry, "cosmos_tiny", device=torch.device("cpu"))
    assert {(c.op, c.backend) for c in made} == {
        ("packed_attention", "grouped"),
        ("packed_attention", "loop"),
        ("self_attention", "explicit"),
        ("cross_attention_pool", "absorbed"),
        ("multi_view_info_nce", "reference"),
    }


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    recipe = str(RECIPES / "cosmos_tiny.yaml")
    options = ["--set", "data.batch_size=2"]
    result = CliRunner().invoke(kernels, [recipe, "--device", "cuda", "--json", *options], catch_exceptions=False)
    rows = json.loads(result.output)
    assert {"op", "backend", "inputs", "why", "others", "calls"} == set(rows[0])
    assert sum(row["calls"] for row in rows if row["op"] == "multi_view_info_nce") == 2
    text = CliRunner().invoke(kernels, [recipe, "--device", "cuda", *options], catch_exceptions=False).output
    assert "2 samples, bf16 on cuda, fp32 products in TF32" in text.splitlines()[0]
    assert "cross_attention: triton" in text
    assert "    not absorbed: after projected in the order" in text
    with pytest.raises(UserError, match="name one"):
        CliRunner().invoke(kernels, ["--set", "a=b"], catch_exceptions=False)
