"""Broken in what all kinds share."""

from components_to_check.broken import broken
from my_plugin.fusion import MeanFusion
from my_plugin.loss import Match
from my_plugin.schedule import Linear
from pydantic import Field

from distill_core.contracts.component import ComponentConfig
from distill_core.plan import Needs


@broken("documented", "write a docstring for the class Undocumented")
class Undocumented(Linear):
    pass


@broken("documented", r"for the option\(s\) bare")
class BareOption(Linear):
    """Told."""

    class Config(ComponentConfig):
        bare: int = 1


@broken("options", r"the example \{\} is refused: urls: is required and not given.*`examples = ")
class Required(Linear):
    class Config(ComponentConfig):
        urls: str
        """Needed."""


@broken("options", "changes extra of model_config")
class Loose(Linear):
    class Config(ComponentConfig):
        model_config = {**ComponentConfig.model_config, "extra": "allow"}  # noqa: RUF012


@broken("options", "must extend LossConfig")
class Weightless(Match):
    class Config(ComponentConfig):
        modalities: tuple[str, str] = ("left", "right")
        """Two."""


@broken("options", "load as different options|are refused")
class Lossy(Linear):
    class Config(ComponentConfig):
        final: float = Field(0.0, exclude=True)
        """Not written out."""

    examples = ({"final": 0.5},)


@broken("named", "the name 'my.loss' must be a word")
class Dotted(Match):
    name = "my.loss"


@broken("needs_and_problems", "`needs` raises IndexError")
class NeedsFirst(MeanFusion):
    @classmethod
    def needs(cls, config, plan):
        return Needs(tokens={list(plan.modalities)[0]: (0,)})  # noqa: RUF015


@broken("needs_and_problems", "`problems` must return strings")
class OneString(MeanFusion):
    @classmethod
    def problems(cls, config, plan):
        return "" if len(plan.modalities) == 2 else "wrong"


@broken("pickled_options", "PicklingError|pickle|AttributeError")
class LocalConfig(Linear):
    @staticmethod
    def make():
        class Hidden(ComponentConfig):
            """Not found by its name."""

        return Hidden


LocalConfig.Config = LocalConfig.make()
