"""What all components share: a kind, a name, options, and what they say of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from distill_core.plan import Needs, Plan


class ComponentConfig(BaseModel):
    """Base of every component's options: unknown keys are errors, types are strict, lists serve for tuples."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Component:
    """Base of all components: a `kind` (from the interface), a `name` that recipes use, and a `Config`.

    An interface is a class that states a `kind` of its own. A plugin may define further ones, for slots of its options:
    `class Reader(Component, ABC): kind = "reader"`, and `reader: Slot[Reader]`.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    Config: ClassVar[type[ComponentConfig]] = ComponentConfig
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Options, as recipes write them, of small instances that `distill check-plugin` builds; {} is the defaults."""

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        """What this component, with these options, needs of the recipe."""
        return Needs()

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """Further reasons, one line each, why it cannot work in this recipe (`plan` may lack broken modalities)."""
        return ()
