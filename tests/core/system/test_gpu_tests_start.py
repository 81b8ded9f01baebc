"""The tests that need a GPU run on a pretended one (tests/support/pretend_gpu.py).

Wrong names, tensors of two devices and wrong expectations show here, not on the day that there is a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu themselves run here")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1800)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")))
def test_file_passes(file: str) -> None:
    done = run(f"tests/gpu/{file}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", done.stdout.splitlines()[-1]), "none is skipped"


def test_the_pretence_refuses_what_a_gpu_refuses(tmp_path: Path) -> None:
    """Its own test: tensors of two devices, and a value that is read while a graph is captured."""
    (tmp_path / "test_wrong.py").write_text("""
import torch

def test_mixed():
    torch.ones(3, device="cuda") + torch.ones(3)

def test_made_on_the_cpu():
    x = torch.ones(2, 3).to("cuda")
    x.masked_fill(torch.arange(3) > 1, 0)

def test_read():
    x = torch.ones(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()

def test_right():
    x = torch.ones(2, 3).to("cuda") * torch.tensor(2.0)
    assert x.device == torch.device("cuda", 0) and x.is_cuda and x.view(6)[:2].sum().device.type == "cuda"
    assert x.cpu().device.type == "cpu" and x.new_zeros(2).is_cuda and torch.empty_like(x).is_cuda
    torch.nn.Linear(3, 2).to("cuda")(x).sum().backward()
""")
    done = run(str(tmp_path / "test_wrong.py"), "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    assert done.stdout.splitlines()[-1].startswith("3 failed, 1 passed"), done.stdout[-3000:]
    assert done.stdout.count("expected all tensors on one device") >= 2
    assert "a captured graph reads no value" in done.stdout
