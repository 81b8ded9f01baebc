"""What a component offers is asked of its class."""

from typing import Any

import pytest
from torch import Tensor, nn

from distill_core.batch import View
from distill_core.contracts.optional import (
    ClassAttention,
    DenseEmbeddings,
    LaidOutTokens,
    TokenAttention,
    TokenPooling,
    offers,
)
from distill_core.interfaces import Backbone, FusionHead
from distill_vl.vit import VisionTransformer, VisionTransformerConfig

PROTOCOLS: dict[str, type] = {
    "dense": DenseEmbeddings,
    "class_attention": ClassAttention,
    "token_layout": LaidOutTokens,
    "pool": TokenPooling,
    "attention": TokenAttention,
}


def bare(base: type, **methods: Any) -> Any:
    """An instance of a class that writes what `base` asks for, and these methods."""
    abstract = {name: lambda self, *arguments: None for name in base.__abstractmethods__}  # type: ignore[attr-defined]
    made = type("Bare", (base,), {**abstract, **methods})
    module = made.__new__(made)
    nn.Module.__init__(module)
    return module


@pytest.mark.parametrize(("name", "protocol"), PROTOCOLS.items())
def test_a_method_is_an_offer_and_a_submodule_of_its_name_is_none(name: str, protocol: type) -> None:
    """Catches an `isinstance`, which in Python 3.11 takes `self.attention = nn.Linear(...)` for the method."""
    base = FusionHead if protocol in (TokenPooling, TokenAttention) else Backbone
    assert not offers(bare(base), protocol), "the interface offers none of them by itself"
    assert offers(bare(base, **{name: lambda self, *arguments: None}), protocol)
    holder = bare(base)
    setattr(holder, name, nn.Identity())
    assert not offers(holder, protocol)


def test_what_is_offered_can_be_called() -> None:
    """The protocols' signatures are those that the ViT has: catches a renamed argument."""
    vit = VisionTransformer(VisionTransformerConfig(image_size=8, patch=4, width=16, layers=1, heads=2, dim=8))
    x = View(Tensor(3, 8, 8).zero_())
    assert offers(vit, LaidOutTokens)
    assert vit.token_layout(x) == (2, 2)
    assert offers(vit, ClassAttention)
    assert vit.class_attention(x.data[None]).shape[0] == 1
    assert offers(vit, DenseEmbeddings)
    assert vit.dense(x.data[None], attention="plain")[1].shape == (1, 2, 2, 8)
