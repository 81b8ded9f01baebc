"""docs/outside.md: its blocks run, are short, and use every part that it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distill_cosmos
import distill_kernels

PAGE = (Path(__file__).parents[2] / "docs" / "outside.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
STAND_INS, LOOPS = BLOCKS[0], BLOCKS[1:]


def run(blocks: list[str]) -> dict[str, Any]:
    """The names that are left after the blocks."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"outside.md, block {number}", "exec"), names)
    return names


def test_the_blocks_run_and_their_weights_move() -> None:
    """Would catch a name or a shape that is out of date, and a loop whose losses reach nothing."""
    names = run(BLOCKS)
    for module in ("student", "fusion", "losses", "attn", "to_dim", "out"):
        gradients = [p.grad for p in names[module].parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), module
    averages, values = (dict(names[x].named_parameters()) for x in ("teacher", "student"))
    assert any(not torch.equal(averages[f"module.{name}"], value) for name, value in values.items())


@pytest.mark.parametrize("number", range(len(LOOPS)))
def test_each_loop_has_under_15_lines(number: int) -> None:
    """Imports and blank lines aside."""
    lines = [line for line in LOOPS[number].splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert any(line.startswith("for ") for line in lines)
    assert len(lines) < 15


def test_sigmoid_losses_go_in_the_same_places() -> None:
    """The page's table says so: with them, too, the loop learns."""
    loop = LOOPS[1]
    assert "Contrastive, CrossModalDistillation)" in loop
    loop = loop.replace("Contrastive, CrossModalDistillation)", "SigmoidContrastive, SigmoidDistillation)")
    loop = "from distill_cosmos import SigmoidContrastive, SigmoidDistillation\n" + loop
    before = run([STAND_INS, LOOPS[0], loop.replace("for views in loader:", "for views in loader[:1]:")])
    after = run([STAND_INS, LOOPS[0], loop.replace("for views in loader:", "for views in loader * 10:")])
    assert {type(loss).__name__ for loss in after["losses"]} == {"SigmoidContrastive", "SigmoidDistillation"}
    assert after["total"] < before["total"]


def test_every_part_is_on_the_page() -> None:
    """Would catch a kernel, or a name of `distill_cosmos`, that is added and not shown in a loop."""
    code = "\n".join(BLOCKS)
    kernels = [name for name in distill_kernels.__all__ if not re.search(rf"\b{name}\(", code)]
    assert kernels == []
    assert [name for name in distill_cosmos.HOMES if f"| `{name}` |" not in PAGE] == []
    for name in distill_cosmos.HOMES:
        assert getattr(distill_cosmos, name).__name__ == name


def test_importing_the_plugin_stays_light() -> None:
    """`distill --help` imports every plugin: it would take seconds with torch."""
    code = "import sys, distill_cosmos; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from distill_cosmos import Nothing  # type: ignore[attr-defined]  # noqa: F401
