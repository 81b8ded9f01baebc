"""Fields: what belongs to a sample and not to a view (`data.fields`): labels, stored embeddings, scores."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from distill_core.batch import Sample
from distill_core.contracts.component import ComponentConfig
from distill_core.errors import AbsentModality, BadSample

if TYPE_CHECKING:
    from numpy.typing import NDArray

Size = Annotated[int, Field(gt=0)]


class FieldConfig(ComponentConfig):
    """Where a field stands in a sample, and its shape and type."""

    member: Annotated[str, Field(min_length=1)]
    """The sample's member that holds it: `cls` or another text of numbers, `npy` (also `teacher.npy`), or `json`."""
    key: str | None = None
    """Of a json: its key; dots lead into objects."""
    shape: tuple[Size, ...] = ()
    """Of one sample's, [] for a single number."""
    dtype: Literal["float32", "float16", "int64", "bool"] = "float32"
    """What it becomes."""

    @model_validator(mode="after")
    def _has_key(self) -> FieldConfig:
        if self._is("json") != (self.key is not None):
            raise ValueError("`key` goes with a json member: give both, or neither")
        return self

    def _is(self, kind: str) -> bool:
        return self.member == kind or self.member.endswith(f".{kind}")

    def read(self, sample: Sample) -> NDArray[Any]:
        """[*shape]. Raises `AbsentModality` where the sample has none, `BadSample` where it is another thing."""
        if self.member not in sample:
            raise AbsentModality(f"no {self.member}")
        data = bytes(sample[self.member])
        try:
            value = self._value(data)
            if value is None:
                raise AbsentModality(f"no {self.key!r} in {self.member}")
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise BadSample(f"{self.member} holds no numbers")
            array = array.reshape(self.shape).astype(self.dtype)
        except (ValueError, OverflowError, RecursionError, EOFError) as error:
            raise BadSample(f"{self.member} is no {self.dtype} of shape {list(self.shape)}: {error}") from error
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadSample(f"{self.member} holds a number that is not finite")
        return array

    def _value(self, data: bytes) -> Any:
        """None: the json has no such key."""
        if self._is("npy"):
            return np.load(io.BytesIO(data), allow_pickle=False)
        if self.key is None:
            numbers = data.decode("utf-8").split()
            return np.array(numbers, dtype=np.int64 if self.dtype == "int64" else np.float64)
        value = json.loads(data)
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


class SampleFields:
    """Raw sample -> its fields. Picklable."""

    def __init__(self, configs: Mapping[str, FieldConfig], optional: Collection[str] = ()) -> None:
        """`optional`: those that a sample may lack."""
        self.configs = dict(configs)
        self.optional = frozenset(optional)

    def __call__(self, sample: Sample) -> dict[str, NDArray[Any]]:
        """Those that the sample has. Raises `BadSample`."""
        fields = {}
        for name, config in self.configs.items():
            try:
                fields[name] = config.read(sample)
            except AbsentModality as error:
                if name not in self.optional:
                    raise BadSample(f"data.fields.{name}: {error}") from error
            except BadSample as error:
                raise BadSample(f"data.fields.{name}: {error}") from error
        return fields

    def stacked(self, samples: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """[B, *shape] of B samples' fields; zeros where a sample lacks one."""
        return {
            name: np.stack([fields.get(name, np.zeros(config.shape, config.dtype)) for fields in samples])
            for name, config in self.configs.items()
        }
