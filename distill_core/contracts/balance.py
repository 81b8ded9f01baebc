"""The contract of what weighs the losses against one another while they are learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from distill_core.contracts.component import Component
from distill_core.outputs import Outputs, Progress


class Balance(nn.Module, Component, ABC):
    """A factor for each loss, learned or by a rule, on top of the recipe's weights.

    The total is the sum over losses of weight * (factor * loss + penalty), where a loss is the sum of its terms.
    """

    kind: ClassVar[str] = "balance"

    def __init__(self, config: Any, losses: Sequence[str]) -> None:
        """`losses`: their ids; a parameter or buffer of each goes by its id, so that a stage of the run may add one."""
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor], outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(factors, penalties) by loss, 0-dim; a loss without a penalty has none.

        `losses` are this rank's; factors are the same on every rank, and no gradient goes through them to a loss.
        State stays as it is.
        """

    def after_step(self, losses: Mapping[str, Tensor], progress: Progress) -> None:
        """Move what is not learned by gradient; called after each optimiser step with this rank's losses, detached.

        State must stay equal on all ranks: take means over them. Where the step was not finite, it is put back.
        """
        return
