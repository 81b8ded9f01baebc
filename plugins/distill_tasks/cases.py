"""What `distill check-plugin` feeds the tasks that need more than a model of the checks: a fusion that pools."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core import (
    GLOBAL,
    ComponentConfig,
    ConformanceCase,
    Features,
    Fused,
    FusionHead,
    ModalityPlan,
    Model,
    Plan,
    Sample,
)
from distill_tasks.conditioned import ConditionedRetrieval, ConditionedRetrievalConfig
from distill_vl.example import model


class Weighted(FusionHead):
    """Each token's share is the softmax of its product with the query; texts read the image alone."""

    name = "weighted"

    def __init__(self, config: ComponentConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.map = nn.Linear(plan.modalities["image"].spec.width, plan.modalities["image"].spec.dim)

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """Of texts."""
        pooled = self.pool("image", features["text"].pooled, features["image"].tokens[0])
        return {"text": Fused(normalize(pooled, dim=-1))}

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] over tokens [B, L, W] -> [V, B, D]."""
        mapped = self.map(tokens)
        shares = torch.einsum("vbd,bld->vbl", queries, mapped).softmax(-1)
        return torch.einsum("vbl,bld->vbd", shares, mapped)


def scorable(config: ConditionedRetrievalConfig) -> tuple[Model, list[Sample]]:
    """A small ViT and text tower with a fusion, and four pairs."""
    built = model()
    specs = {name: module.spec(module.config) for name, module in built.backbone.items()}
    plan = Plan({name: ModalityPlan((GLOBAL,), spec) for name, spec in specs.items()}, fusion=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built.fusion = Weighted(ComponentConfig(), plan)
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(4):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        text = json.dumps({"references": [f"noise {i}", f"a picture of noise {i}"]}).encode()
        samples.append({"__key__": f"noise-{i}", "__url__": "noise", "png": file.getvalue(), "json": text})
    return built, samples


CASES = [ConformanceCase(ConditionedRetrieval, scorable=scorable)]
