"""docs/data_types.md: its code runs, in order, and it names every field of every type."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from distill_core.batch import Batch, Group, View, Views
from distill_core.outputs import Features, Fused, Outputs, Progress
from distill_core.plan import ModalityPlan, Needs, Plan

PAGE = Path(__file__).parents[2] / "docs" / "data_types.md"


def test_the_code_runs() -> None:
    """The page asserts: would catch a shape or a name that is out of date, and a loop that learns nothing."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert len(names["totals"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [View, Group, Views, Batch, Features, Fused, Outputs, Progress, Plan, ModalityPlan, Needs]
)
def test_every_field_is_named(kind: type) -> None:
    """Would catch a field that is added and not explained, in the row of its type."""
    row = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{kind.__name__}` |")
    )
    missing = [f.name for f in fields(kind) if not f.name.startswith("_") and not re.search(rf"`{f.name}\b", row)]
    assert not missing, f"docs/data_types.md says nothing of {kind.__name__}.{', '.join(missing)}"
