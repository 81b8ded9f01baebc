"""The contract of what a step cannot hold by itself: another way to the gradients, work before and after a step."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from distill_core.batch import Batch
from distill_core.contracts.component import Component
from distill_core.objective import Losses
from distill_core.outputs import Outputs, Progress


class Computation:
    """The losses and gradients of one step, as often as a hook wants them."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        progress: Progress,
        forward: Callable[[], tuple[Outputs, Losses]],
        backward: Callable[[Tensor], None],
        average: Callable[[], None],
    ) -> None:
        self.parameters = parameters
        """(name, parameter) of what is trained."""
        self.progress = progress
        self.outputs: Outputs | None = None
        """Of the last forward pass."""
        self._forward, self._backward, self._average = forward, backward, average

    def forward(self) -> Losses:
        """A forward pass of student, teacher, fusion and losses over the step's batch."""
        self.outputs, losses = self._forward()
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a 0-dim `loss` to the parameters' `grad`, averaged over ranks.

        Once after each `forward`, whose graph it frees.
        """
        self._backward(loss)

    def average(self) -> None:
        """Average over ranks the gradients that a hook has put into `grad` itself.

        Those of towers that are spread over ranks, and of micro-batches, come by `backward` alone. Raises `UserError`
        for micro-batches.
        """
        self._average()

    def plain(self) -> Losses:
        """One forward pass, and the gradients of the total."""
        losses = self.forward()
        self.backward(losses.total)
        return losses


class Hook(Component, ABC):
    """Something around a training step. Every rank calls the methods; a recipe's hooks stand around one another, the
    first outermost.

    Steps that turn out not to be finite are computed as others are, and then update nothing.
    """

    kind = "hook"

    def __init__(self, config: Any) -> None:
        self.config = config

    def before_forward(self, batch: Batch, progress: Progress) -> Batch:
        """The batch of this step, as the loader made it or changed."""
        return batch

    def gradients(self, computation: Computation, compute: Callable[[], Losses]) -> Losses:
        """Leave the step's gradients in `grad` of the parameters, which are without any; return what is logged.

        `compute()` does so as without this hook; it may be called several times, with weights that have been moved in
        between, and moved back. A hook that needs the terms calls `computation.forward` and `backward` in its place.
        """
        return compute()

    def after_step(self, computation: Computation, finite: Tensor) -> None:
        """Called after optimiser and teacher. Where `finite`, a 0-dim bool on the device, is False, nothing moved."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain data and tensors, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a `state_dict`."""
        return
