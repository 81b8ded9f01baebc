"""What needs a GPU: without one, every test of this folder is skipped, and says so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def ampere(gpu: torch.device) -> None:
    """NVIDIA's cards from compute capability 8.0 on, for which our kernels and flash attention are built."""
    if torch.version.hip or torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name(gpu)} has no kernels for compute capability 8.0")
