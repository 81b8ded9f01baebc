"""What `distill check-plugin` feeds the task of conditioned retrieval: a small model with FLAIR's fusion."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from distill_core import GLOBAL, ComponentConfig, ConformanceCase, ModalityPlan, Model, Plan, Sample
from distill_flair.fusion import TextConditionedPool, TextConditionedPoolConfig
from distill_tasks.conditioned import ConditionedRetrieval
from distill_vl.example import model


def scorable(config: ComponentConfig) -> tuple[Model, list[Sample]]:
    """A small ViT and text tower with a fusion, and four images of noise with two captions each."""
    built = model()
    specs = {name: module.spec(module.config) for name, module in built.backbone.items()}
    plan = Plan({name: ModalityPlan((GLOBAL,), spec) for name, spec in specs.items()}, fusion=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built.fusion = TextConditionedPool(TextConditionedPoolConfig(queries=("text",), heads=2), plan)
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(4):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        text = json.dumps({"references": [f"noise {i}", f"a picture of noise {i}"]}).encode()
        samples.append({"__key__": f"noise-{i}", "__url__": "noise", "png": file.getvalue(), "json": text})
    return built, samples


CASES = [ConformanceCase(ConditionedRetrieval, scorable=scorable)]
