"""The contract of weights to start from, and a run's or a file's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.errors import UserError
from distill_core.run.checkpoint import Checkpoints, read_checkpoint
from distill_core.system.state_dicts import choose, read_tensors

if TYPE_CHECKING:
    from distill_core.objective import Objective


@dataclass(frozen=True)
class LoadReport:
    """What a loader did: one line for the user, and the names of the objective's tensors that it loaded."""

    line: str
    names: frozenset[str]


class WeightLoader(Component, ABC):
    """Weights to start from: an entry of a recipe's `weights`."""

    kind = "weights"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, objective: Objective) -> LoadReport:
        """Load weights into the objective. Raises `UserError`, and has loaded nothing then.

        What the teacher is not given it takes from the student afterwards.
        """


class StateDictConfig(ComponentConfig):
    """A file or a run, and the part of the model it goes to."""

    source: str
    """A `.safetensors` file, a torch file of a state dict, or a run folder."""
    to: str = ""
    """Path of the part that is loaded, as `backbone.image`; empty for the whole model."""
    prefix: str | None = None
    """Take the source's keys under this prefix, without it; null takes `to` for a run, and all keys of a file.
    Names of DistributedDataParallel begin with `module`, those of torch.compile with `_orig_mod`."""
    key: str | None = None
    """The state dict that is taken where a torch file holds several, as `model_ema`."""
    strict: bool = True
    """Every parameter of the part must be in the source, and every key taken must be in the part."""
    checkpoint: str = "last"
    """Of a run: `last`, `best` or a step."""


class StateDictLoader(WeightLoader):
    """Load a state dict into the model or a part of it; shapes must agree."""

    name = "state_dict"
    Config = StateDictConfig
    examples = ({"source": "no-such-file.pt"},)

    def apply(self, objective: Any) -> LoadReport:
        """Raises `UserError` with the keys that are missing, unknown or of a wrong shape; loads nothing then."""
        source, to = self.config.source, self.config.to
        state, is_run, remarks = self._read(Path(source))
        prefix = self.config.prefix if self.config.prefix is not None else (to if is_run else "")
        start = f"{prefix}." if prefix else ""
        model_state = objective.state_dict()
        inside = f"{to}." if to else ""
        loaded = {inside + key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
        expected = {name for name in model_state if name.startswith(inside)}
        if not to:  # of teachers, what there is
            expected = {name for name in expected if name in loaded or not name.startswith("teacher.")}
        shapes = [
            f"{name}: shape {list(loaded[name].shape)}, this model has {list(model_state[name].shape)}"
            for name in sorted(expected & set(loaded))
            if loaded[name].shape != model_state[name].shape
        ]
        missing = [f"{name}: missing" for name in sorted(expected - set(loaded))]
        unknown = [f"{name}: not in this model" for name in sorted(set(loaded) - expected)]
        # some of each kind: a wrong prefix shows in what is missing beside what is unknown
        wrong = _some(shapes) + (_some(missing) + _some(unknown) if self.config.strict else [])
        if not expected:
            wrong = [f"{to!r} names no part of the model"]
        if wrong:
            raise UserError(f"weights: {source} does not fit:\n  " + "\n  ".join(wrong))
        names = expected & set(loaded)
        objective.load_state_dict({name: loaded[name] for name in names}, strict=False)
        if expected - names:
            remarks = [*remarks, f"{len(expected - names)} of this model keep their first weights"]
        line = "; ".join([f"{source}: {len(names)} tensors into {to or 'the model'}", *remarks])
        return LoadReport(line, frozenset(names))

    def _read(self, path: Path) -> tuple[dict[str, Tensor], bool, list[str]]:
        """(state dict, whether it is a run's, what to tell of the file)."""
        if (path / "recipe.yaml").is_file():
            if self.config.key is not None:
                raise UserError(f"weights: {path}: `key` is for files; of a run, `to` and `prefix` name a part")
            remarks: list[str] = []
            return Checkpoints(path).read(self.config.checkpoint, remarks.append)["objective"], True, remarks
        if not path.is_file():
            raise UserError(f"weights: {path}: no such file or run folder")
        content = read_tensors(path)
        if self.config.key is None and isinstance(content, dict) and "objective" in content and "version" in content:
            return read_checkpoint(path)["objective"], True, []  # once more, against its digest
        state, remarks = choose(content, path, self.config.key)
        return state, False, remarks


def _some(lines: list[str], most: int = 4) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more like it"]
