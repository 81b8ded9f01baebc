"""Logs to an Aim repository."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_core import Tracker, TrackerConfig, write_whole


class AimConfig(TrackerConfig):
    """Where Aim keeps its runs."""

    repo: str | None = None
    """Folder of the repository (it holds `.aim`); null takes the folder that the run folders lie in."""
    experiment: str = "distill"
    """Aim's experiment name."""


class AimTracker(Tracker):
    """One Aim run for each run folder; a resumed run continues in the same one.

    One that goes back to an older checkpoint is a new one, with the parameter `parent`: the hash of the one before.
    """

    name = "aim"
    Config = AimConfig

    def start(self, folder: str, name: str, recipe: dict[str, Any], resume: bool) -> None:
        """Opens the run; its hash is kept in the run folder."""
        from aim.sdk.run import Run

        from distill_aim.repository import limit_exit, prepare

        memory = Path(folder) / "aim.json"
        # whole: `distill ui` may be asked for it from another folder
        repo = str((Path(self.config.repo).expanduser() if self.config.repo else Path(folder).parent).absolute())
        prepare(Path(repo))
        limit_exit()
        known = json.loads(memory.read_text())["run"] if memory.exists() else None
        self.run = Run(
            known if resume else None,
            repo=repo,
            experiment=self.config.experiment,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        write_whole(memory, json.dumps({"run": self.run.hash, "repo": repo}))
        self.run.name = name
        self.run["recipe"] = recipe
        if known is not None and not resume:
            self.run["parent"] = known

    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        """A series a name; values that are not finite are left out (Aim cannot draw them)."""
        for name, value in values.items():
            if math.isfinite(value):
                self.run.track(value, name=name, step=step, context=dict(context))

    def describe(self, facts: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Run parameters `environment`, and Aim's tags: `"vit" in run.tags and run.environment.git.dirty == False`."""
        self.run["environment"] = dict(facts)
        known = set(self.run.tags)
        for tag in tags:
            if tag not in known:
                self.run.add_tag(tag)

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        """In Aim's images, with its caption."""
        from aim.sdk.objects.image import Image

        self.run.track(Image(picture, caption), name=name, step=step, context=dict(context))

    def distribution(self, step: int, name: str, values: np.ndarray, context: Mapping[str, str]) -> None:
        """In Aim's distributions, in 64 bins."""
        from aim.sdk.objects.distribution import Distribution

        histogram = Distribution(values)  # type: ignore[no-untyped-call]
        self.run.track(histogram, name=name, step=step, context=dict(context))

    def finish(self) -> None:
        self.run.close()
