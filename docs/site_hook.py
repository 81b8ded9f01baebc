"""What mkdocs adds to the pages of this folder: the README as the home page, and the reference, made when it builds."""

from pathlib import Path

from mkdocs.structure.files import File

from distill_authoring.reference import pages
from distill_core.registry import Plugins, Registry


def on_files(files, config):
    """Called by mkdocs with the pages that it found."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    made = {"index.md": readme.replace("](docs/", "](")}
    plugins = Plugins.discover()
    made |= {f"reference/{path}": text for path, text in pages(Registry.discover(plugins), plugins).items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files
