"""Files of weights: which of several state dicts is taken, what wrappers put into names, what is code."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill_core.errors import UserError
from distill_core.system.state_dicts import read_state_dict, unwrapped

A, B = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
OPTIMIZER: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("found", "key", "value", "said"),
    [
        (A, None, 1, []),
        ({"model": B, "optimizer": OPTIMIZER, "epoch": 3}, None, 2, ["its 'model' was used"]),
        ({"net": A, "optimizer": OPTIMIZER}, None, 1, ["its 'net' was used"]),
        ({"ema": A, "model": B}, None, 2, ["its 'model' was used (`key` may also be: ema)"]),
        ({"model": A, "model_ema": B}, None, 2, ["its 'model_ema' was used (`key` may also be: model)"]),
        ({"student": A, "teacher": B}, "teacher", 2, []),
        ({"teacher": {"model": B}, "student": A}, "teacher", 2, ["its 'model' was used"]),
        ({0: A}, None, 1, ["its '0' was used"]),
    ],
)
def test_which_is_taken(tmp_path: Path, found: Any, key: str | None, value: float, said: list[str]) -> None:
    torch.save(found, tmp_path / "w.pt")
    state, told = read_state_dict(tmp_path / "w.pt", key)
    assert state["w"].item() == value
    assert told == said


@pytest.mark.parametrize(
    ("found", "key", "message"),
    [
        ({"student": A, "teacher": B}, None, "holds 2 state dicts: student, teacher; say which: key: student"),
        ({"student": A, "teacher": B}, "ema", r"no state dict 'ema' \(there are: student, teacher\)"),
        (A, "ema", r"no state dict 'ema' \(there are: none\)"),
        ({"optimizer": OPTIMIZER}, None, "holds no state dict"),
        ({}, None, "holds no state dict"),
        ([1], "a", "holds no state dict 'a'"),
        (torch.zeros(2), None, "holds no state dict"),
    ],
)
def test_none_or_several(tmp_path: Path, found: Any, key: str | None, message: str) -> None:
    torch.save(found, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "w.pt", key)


def test_wrappers() -> None:
    """What torch.compile, an average, and DistributedDataParallel add (DataParallel's, which needs no processes)."""

    def plain() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})

    part = plain()
    part["b"] = torch.compile(part["b"])
    modules: list[Any] = [
        part,
        torch.compile(plain()),
        nn.DataParallel(plain()),
        torch.compile(nn.DataParallel(plain())),
        nn.DataParallel(torch.compile(plain())),
        torch.optim.swa_utils.AveragedModel(plain()),
        torch.optim.swa_utils.AveragedModel(nn.DataParallel(plain())),
    ]
    for module in modules:
        state = module.state_dict()
        assert set(state) != set(plain().state_dict())
        assert set(unwrapped(state)) == set(plain().state_dict())


def test_names_are_text_and_stay_apart(tmp_path: Path) -> None:
    """Numbers as names; a `module` that is the model's own; two names that would be one."""
    torch.save({"model": {0: torch.zeros(1)}}, tmp_path / "w.pt")
    assert list(read_state_dict(tmp_path / "w.pt")[0]) == ["0"]
    assert set(unwrapped({"module.a": torch.zeros(1), "a": torch.ones(1)})) == {"module.a", "a"}
    with pytest.raises(UserError, match="holds 'a' twice"):
        unwrapped({"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)})


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(A, path)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory : directory + 4] = b"XXXX"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"w\.pt: cannot be loaded"):
        read_state_dict(path)


def test_no_advice_to_load_it_unsafely(tmp_path: Path) -> None:
    """A picture, say, or a checkpoint with other objects: one line without torch's own, which advises just that."""
    path = tmp_path / "w.png"
    for content in (b"\xffPNG", None):
        if content is None:
            torch.save({"model": A, "args": argparse.Namespace(lr=1)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"w\.png: cannot be loaded: no torch file of tensors alone \(.+\)"
        ) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


def test_the_way_out_of_an_archive(tmp_path: Path) -> None:
    """The command that the error gives, run as it stands, makes a file that is read. The path has what shells mind."""
    path = tmp_path / "it's $HOME" / "ViT-B-32.pt"
    path.parent.mkdir()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="a TorchScript archive, which is code") as caught:
        read_state_dict(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    python, option, code = shlex.split(lines[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    state, _ = read_state_dict(path.with_name("ViT-B-32-state.pt"))
    assert {name: list(value.shape) for name, value in state.items()} == {"weight": [2, 2], "bias": [2]}
