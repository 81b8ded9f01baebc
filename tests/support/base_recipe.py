"""The recipe that tests of the grammar start from."""

from collections.abc import Callable

from distill_core.recipe.sections import Recipe

BASE = """\
augment:
  image: {name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}
  text: {name: text_crop, global: 2, local: 1}
backbone:
  image: {name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}
  text: {name: clip_text, width: 16, layers: 1, heads: 2, dim: 16}
fusion: {name: cross_attention, heads: 2}
loss:
  - {name: contrastive}
  - {name: cross_modal_distillation}
teacher: {momentum: 0.9}
data:
  source: {name: webdataset, urls: x.tar, test: y.tar}
train: {steps: 4}
evaluate:
  tasks: [retrieval]
"""


Check = Callable[..., Recipe]


Errors = Callable[..., list[str]]
