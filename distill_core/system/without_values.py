"""A step on tensors that have shapes and no values: it costs neither memory nor arithmetic, whatever its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode

from distill_core.errors import UserError

M = TypeVar("M", bound=nn.Module)


class WithoutValues(TorchFunctionMode):
    """`build` and `convert` make modules and tensors of the CPU without values (torch's FakeTensor).

    Integers and bools of a batch keep theirs, but for bytes (pixels, most of a batch's memory): towers read lengths
    from token ids, and masks from positions. While the mode is on, such a mask selects from tensors without values, and
    writes into them: as indices, whose number is known. Leaving it turns torch's complaint about a component that reads
    values which are not there into a `UserError`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def convert(self, tensor: Tensor) -> Tensor:
        """The tensor without values, or itself where it is neither of floating point nor of bytes."""
        return self._like(tensor) if _has_no_index(tensor) else tensor

    def build(self, make: Callable[[], M]) -> M:
        """The module that `make` builds, on the meta device, so that no weight is ever in memory.

        Its integers and bools are zeros. What holds its tensors outside of modules (a teacher's lists for its average)
        still has those of that device.
        """
        with torch.device("meta"):
            whole = make()
        made: dict[int, Tensor] = {}  # shared tensors stay shared
        for module in whole.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = self._like(tensor)
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]
        return whole

    def _like(self, tensor: Tensor) -> Tensor:
        if not _has_no_index(tensor):
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        with self._fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is_mask(args[1]):
            args = (args[0], args[1].nonzero(as_tuple=True), *args[2:])
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            raise UserError(
                f"a component's step reads the values of its tensors ({error.func}), which a step that is only looked "
                "at has not"
            ) from error


def _has_no_index(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
