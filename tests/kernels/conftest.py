"""Kernel tests run on a CPU: Triton's interpreter is chosen when triton is first imported, so before the tests."""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/kernels could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
