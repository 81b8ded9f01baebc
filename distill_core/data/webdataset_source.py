"""The data source of a user's own WebDataset shards."""

from __future__ import annotations

from pydantic import model_validator

from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.source import DataSource
from distill_core.data.shard import Shard, check
from distill_core.data.tar_shards import tar_shards

Urls = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


class WebDatasetConfig(ComponentConfig):
    """A name, a list of names, or {set: names}. Names may have braces ({0000..0575}) and, for files, wildcards."""

    urls: Urls | None = None
    """Training shards: paths, URLs, or `pipe:COMMAND`; null for a source that is only evaluated on."""
    validation: Urls | None = None
    """Shards of the validation split."""
    test: Urls | None = None
    """Shards of the test split."""

    @model_validator(mode="after")
    def _has_shards(self) -> WebDatasetConfig:
        if self.urls is None and self.validation is None and self.test is None:
            raise ValueError("names no shards: give `urls` (to train on), `validation` or `test`")
        return self


class WebDatasetSource(DataSource):
    """Tar shards in the WebDataset layout."""

    name = "webdataset"
    Config = WebDatasetConfig
    examples = (
        {"urls": "no-such-folder/train-{00..03}.tar"},
        {"urls": {"set": ["no-such-folder/*.tar"]}, "test": "t.tar"},
    )

    @classmethod
    def splits(cls, config: WebDatasetConfig) -> tuple[str, ...]:
        """Those whose shards are named."""
        named = {"train": config.urls, "validation": config.validation, "test": config.test}
        return tuple(split for split, urls in named.items() if urls is not None)

    def prepare(self) -> None:
        """Checks the local shards that are scored; training checks its own, unless it is resumed."""
        for split in ("validation", "test"):
            for shards in self.sets(split).values():
                check(shards)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """By set; a source without names for its sets has one, `data`."""
        urls = {
            "train": self.config.urls,
            "validation": self.config.validation,
            "test": self.config.test,
        }.get(split)
        return tar_shards(urls) if urls is not None else {}
