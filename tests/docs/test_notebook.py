"""docs/fit.ipynb: its cells run in order, from nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emoji_packages import missing

NOTEBOOK = json.loads((Path(__file__).parents[2] / "docs" / "fit.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
ENDS = 'print(json.dumps({"steps": [*losses], "rows": [row for _, row in history], "texts": list(texts.shape)}))'


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}")
def test_its_cells_run(tmp_path: Path) -> None:
    """Would catch a name or an option that is out of date, and a callback that is not called."""
    script = tmp_path / "cells.py"
    script.write_text("\n".join([*CELLS, "import json", ENDS]), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    assert "fusion.heads: must be an integer, got 'many'" in run.stdout
    ends = json.loads(run.stdout.splitlines()[-1])
    assert ends["steps"] == [1, 2, 3, 4, 5, 6, 7, 8]
    rows = (tmp_path / "runs" / "cosmos_tiny" / "metrics.jsonl").read_text().splitlines()
    assert ends["rows"] == [json.loads(row) for row in rows]
    assert ends["texts"] == [2, 128]


def test_it_is_committed_without_outputs() -> None:
    """Outputs would be those of another version, and pictures in the repository."""
    assert [cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"] == [[]] * len(CELLS)
