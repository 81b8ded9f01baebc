"""What to compile ahead of time: a kernel module lists its shipped variants as `Spec`s (no GPU needed).

`kernels/bench/resources.py` compiles them for each target and reads the binaries.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Spec(NamedTuple):
    """One variant of a kernel, typed as a launch types it."""

    name: str
    variant: str  # in words: dtype, sizes, options
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]  # argument -> value, for the constexprs
    warps: int
    stages: int
    registers: int | None  # NVIDIA: the most that a thread may use, None for the compiler's choice

    @property
    def nvidia_only(self) -> bool:
        """Whether other cards never get it: their fp32 products are always exact (`launches.dot_precision`)."""
        return bool(self.constants["PRECISION"] == "tf32x3")


def precisions(dtype: str) -> tuple[str, ...]:
    """What `launches.dot_precision` may be for "bf16", "fp16" or "fp32" operands; half precision does not read it."""
    return ("ieee", "tf32x3") if dtype == "fp32" else ("ieee",)


def make_spec(
    kernel: Any,
    variant: str,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int,
    stages: int = 3,
    registers: int | None = None,
) -> Spec:
    """A `Spec` from the types of the run-time arguments and the values of the constant ones.

    Every argument that is in neither is an integer ("i32"); `constants` wins. Raises ValueError for a name
    that the kernel does not take.
    """
    names = list(kernel.arg_names)
    unknown = (types.keys() | constants.keys()) - set(names)
    if unknown:
        raise ValueError(f"{kernel.__name__} takes no argument {', '.join(sorted(unknown))}")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    return Spec(kernel.__name__, variant, kernel, signature, constants, warps, stages, registers)
