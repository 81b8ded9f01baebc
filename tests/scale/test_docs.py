"""docs/scale.md: its plans are what the command prints."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from distill_kernels import machine
from distill_kernels.attention import memory_efficient
from distill_scale.commands import plan

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n\$ distill plan ((?:[^\n]*\\\n)*[^\n]+)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with Triton, a compiler, and an xformers that was built for another CUDA."""
    monkeypatch.setattr(machine, "interpreting", lambda: False)
    monkeypatch.setattr(machine, "why_not_installed", lambda package: None)
    monkeypatch.setattr(machine, "_why_not_compile", lambda: None)
    monkeypatch.setattr(memory_efficient, "why_not_built", lambda: "for another CUDA")


def test_the_plans_are_there() -> None:
    """Guards the test below against an empty list."""
    devices = [re.search(r"--devices (\S+)", arguments) for arguments, _ in BLOCKS]
    assert [match.group(1) for match in devices if match] == ["1,8,64,512"]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "printed"), BLOCKS, ids=[arguments.split()[0] for arguments, _ in BLOCKS])
def test_a_plan_is_what_the_command_prints(arguments: str, printed: str) -> None:
    result = CliRunner().invoke(plan, shlex.split(arguments.replace("\\\n", " ")), env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert lines(result.output) == lines(printed)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]
