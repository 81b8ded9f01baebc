"""Weights under the public names: strict loading into student and teacher."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distill_core.errors import UserError
from distill_core.objective import Objective
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_cosmos import official

RECIPE = """
augment: {image: {name: multi_crop, size: 12, local_size: 8}, text: {name: text_crop}}
backbone:
  image: {name: vit, image_size: 12, patch: 4, width: 12, layers: 2, heads: 2, dim: 6}
  text: {name: clip_text, context: 7,  width: 8, layers: 2, heads: 2, dim: 6}
fusion: {name: cross_attention, heads: 2}
loss: [{name: contrastive}, {name: cross_modal_distillation}]
teacher: {}
data: {source: {name: emoji}}
train: {steps: 1}
"""


@pytest.fixture
def objective() -> Objective:
    return build_objective(parse_recipe(RECIPE, "r.yaml", registry=Registry.discover()))


@pytest.fixture
def states(transcription: ModuleType) -> dict[str, dict[str, Tensor]]:
    return {
        who: transcription.make_weights(seed, torch.float32, vocab=49408)
        for seed, who in enumerate(("student", "teacher"))
    }


def test_every_weight_arrives_where_it_belongs(objective: Objective, states: dict[str, dict[str, Tensor]]) -> None:
    loaded = official.load_state_dict(objective, states)
    assert loaded.student == len(states["student"])
    ours = dict(objective.named_parameters())
    assert torch.equal(ours["backbone.image.conv1.weight"], states["student"]["visual.conv1.weight"])
    # the pooler named after the text attends over text tokens: its queries are the image views
    pooler = "text_attn_cross_pool.attn.in_proj_weight"
    assert torch.equal(ours["fusion.pooler.text.attn.in_proj_weight"], states["student"][pooler])
    assert torch.equal(ours["fusion.token_map.image.bias"], states["student"]["image_token_mapping.bias"])
    assert torch.equal(ours["loss.cross_modal_distillation.logit_scale"], states["student"]["distill_logit_scale"])
    teacher = states["teacher"]["transformer.resblocks.1.mlp.c_proj.weight"]
    assert torch.equal(ours["teacher.default.backbone.text.transformer.resblocks.1.mlp.c_proj.weight"], teacher)
    written = official.public_state_dict(objective)
    assert set(written["student"]) == set(states["student"])
    for key, value in written["student"].items():
        assert torch.equal(value, states["student"][key]), key


def test_teacher_keys_that_nothing_uses_are_reported(
    objective: Objective, states: dict[str, dict[str, Tensor]]
) -> None:
    unused = official.load_state_dict(objective, states).unused
    assert "logit_scale" in unused
    assert "visual.attn_cross_pool.ln_q.weight" in unused
    assert "image_token_mapping.weight" in unused
    assert not any(key.startswith(("visual.conv1", "transformer.")) for key in unused)
    states["teacher"]["image_token_mapping.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"teacher: image_token_mapping.weight: shape \[2, 2\]"):
        official.load_state_dict(objective, states)


def test_strict(objective: Objective, states: dict[str, dict[str, Tensor]]) -> None:
    before = {name: p.clone() for name, p in objective.named_parameters()}
    del states["student"]["visual.proj"]
    del states["teacher"]["ln_final.weight"]
    states["student"]["positional_embedding"] = torch.zeros(9, 8)
    states["student"]["visual.surprise"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        official.load_state_dict(objective, states)
    text = str(caught.value)
    assert "student: visual.proj: missing" in text
    assert "teacher: ln_final.weight: missing" in text
    assert "student: positional_embedding: shape [9, 8], this model has [7, 8]" in text
    assert "student: visual.surprise: not a key of this model" in text
    assert all(torch.equal(p, before[name]) for name, p in objective.named_parameters()), "something was loaded"
    with pytest.raises(UserError, match="no 'teacher' weights"):
        official.load_state_dict(objective, {"student": states["student"]})


def test_names_of_data_parallel_checkpoints(objective: Objective, states: dict[str, dict[str, Tensor]]) -> None:
    wrapped = {who: {f"module.{key}": value for key, value in state.items()} for who, state in states.items()}
    assert official.load_state_dict(objective, wrapped).student == len(states["student"])


def test_from_a_file_in_a_recipe(objective: Objective, states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    file = tmp_path / "cosmos.pt"
    torch.save({**states, "epoch": 3}, file)
    text = RECIPE + f"weights: [{{name: cosmos_checkpoint, file: {file}}}]\n"
    recipe = parse_recipe(text, "r.yaml", registry=Registry.discover())
    report = recipe.weights[0].build().apply(objective)
    assert f"{len(states['student'])} student" in report.line
    assert torch.equal(objective.backbone["image"].proj, states["student"]["visual.proj"])
    file.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be loaded"):
        recipe.weights[0].build().apply(objective)
