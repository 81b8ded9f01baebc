"""What a backbone or a fusion may offer beyond a training step: protocols, each of one method.

A class offers one by writing its method; code that needs it calls `offers`, and reports what is missing. Training
calls none of them but `pool`, which some losses do: such a loss is refused, before anything is built, in a recipe whose
fusion does not offer it (`Plan.fusion_pools`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar, runtime_checkable

from distill_core.batch import View
from distill_core.contracts.media import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P")


def offers(module: object, protocol: type[P]) -> TypeGuard[P]:
    """Whether the class of `module` writes the protocol's method."""
    # not isinstance: in Python 3.11 it takes a submodule of that name (`self.attention = ...`) for the method
    return issubclass(type(module), protocol)


@runtime_checkable
class DenseEmbeddings(Protocol):
    """Of a backbone: embeddings of the places of its input. `BackboneSpec.dense` names the kinds of attention."""

    def dense(self, x: Tensor, *, attention: str) -> tuple[Tensor, Tensor]:
        """N inputs of one shape -> (embeddings [N, D], dense embeddings [N, ..., D] of the tokens where they stand).

        For evaluations that compare places with other modalities (segmentation), without gradients. Both are projected
        as `pooled` is, not normalised; where tokens lie in a grid, dense ones are [N, rows, columns, D]. `plain`
        attention changes nothing, so its embeddings are `pooled`.
        """
        ...


@runtime_checkable
class ClassAttention(Protocol):
    """Of a backbone: how it reads its own tokens. Used for figures, and need not be fast."""

    def class_attention(self, x: Tensor) -> Tensor:
        """How the last block reads the tokens for `pooled`: weights [N, H, L] of N inputs, as `encode` takes them.

        L as the tokens of `encode`, zero at padding. What a row lacks to one goes to tokens that are not handed on, as
        the class token itself.
        """
        ...


@runtime_checkable
class LaidOutTokens(Protocol):
    """Of a backbone: where its tokens are. Used for figures."""

    def token_layout(self, view: View) -> TokenLayout:
        """Where a view's tokens are in what `Augmentation.render` makes of it: rows and columns, or a str a token."""
        ...


@runtime_checkable
class Detokenizes(Protocol):
    """Of a backbone with a `BackboneSpec.vocabulary`: what its ids say, for `Model.generate`."""

    def detokenize(self, ids: Tensor) -> list[Any]:
        """The items that ids [N, L] stand for, each from `start` (left out) to its first `end`."""
        ...


@runtime_checkable
class TokenPooling(Protocol):
    """Of a fusion: for losses that pair queries and tokens themselves, and for tasks (`Model.pool`)."""

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [V, B, D] attend over one modality's tokens [B, L, W] (mask [B, L]) -> [V, B, D]."""
        ...


@runtime_checkable
class TokenAttention(Protocol):
    """Of a fusion: how it reads tokens. Used for figures, and need not be fast."""

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The weights with which `queries` [V, B, D] read one modality's tokens [B, L, W]: [V, B, H, L], zero at
        padding (mask [B, L]). Of several layers, the last one's. None where the fusion does not read this modality."""
        ...
