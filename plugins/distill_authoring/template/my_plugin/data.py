"""Where shards come from: tar files whose samples are `KEY.FIELD`."""

import io
import os
import tarfile
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import ComponentConfig, DataError, DataSource, TarShard, cache_folder

SPLITS = {"train": 1.0, "validation": 0.25, "test": 0.25}


class WavesConfig(ComponentConfig):
    """Options of `my_plugin_waves`."""

    samples: Annotated[int, Field(ge=8)] = 1024
    """Training samples; validation and test have a quarter as many."""
    length: Annotated[int, Field(gt=0)] = 64
    """Numbers in a signal."""


class Waves(DataSource):
    """Made-up waves of random frequency and phase, as two sensors measure them, the second a moment later."""

    name = "my_plugin_waves"
    Config = WavesConfig
    examples = ({"samples": 16, "length": 16},)

    @classmethod
    def splits(cls, config):
        """A recipe that evaluates on another is refused at once."""
        return tuple(SPLITS)

    def prepare(self):
        """Write the shards once, into the cache of distill."""
        for number, split in enumerate(SPLITS):
            path = self._path(split)
            if path.is_file():
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".part-{os.getpid()}")
                self._write(part, int(self.config.samples * SPLITS[split]), np.random.default_rng(number))
                part.replace(path)
            except OSError as error:
                raise DataError(f"my_plugin_waves: cannot write {path}: {error.strerror or error}") from error

    def sets(self, split):
        """One set of one shard."""
        return {"waves": [TarShard(self._path(split))]} if split in SPLITS else {}

    def _path(self, split):
        return cache_folder() / f"my_plugin-1-{self.config.samples}-{self.config.length}" / f"{split}.tar"

    def _write(self, path, samples, rng):
        time = np.arange(self.config.length) / self.config.length
        with tarfile.open(path, "w") as tar:
            for i in range(samples):
                cycles, phase = rng.uniform(1, 8), rng.uniform(0, 2 * np.pi)
                for field, lag in (("left", 0.0), ("right", 0.5)):
                    data = np.sin(2 * np.pi * cycles * time + phase + lag).astype(np.float32).tobytes()
                    entry = tarfile.TarInfo(f"wave-{i:06d}.{field}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
