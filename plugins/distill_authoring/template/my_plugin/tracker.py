"""Where metrics go beside `metrics.jsonl`."""

import csv
from pathlib import Path

from distill_core import ComponentConfig, Tracker


class CsvConfig(ComponentConfig):
    """Options of `my_plugin_csv`; extend TrackerConfig instead to be given pictures and distributions too."""

    file: str = "metrics.csv"
    """Name of the file in the run folder."""


class Csv(Tracker):
    """Rows of step, subset, name and value."""

    name = "my_plugin_csv"
    Config = CsvConfig

    def start(self, folder, name, recipe, resume):
        """A resumed run continues the same file."""
        self.file = (Path(folder) / self.config.file).open("a" if resume else "w", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)

    def log(self, step, values, context):
        """A row a value."""
        self.rows.writerows((step, context.get("subset", ""), name, value) for name, value in values.items())

    def finish(self):
        """Flush and close."""
        self.file.close()
