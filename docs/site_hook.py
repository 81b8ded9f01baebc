"""What mkdocs adds to the pages of docs: the README as home page, the log, and the generated reference."""

from pathlib import Path

from mkdocs.structure.files import File

from distill_authoring.reference import pages
from distill_core.tools import Plugins, Registry


def on_files(files, config):
    """Called by mkdocs with the pages in docs/."""
    root = Path(config.config_file_path).parent
    generated = {
        "index.md": (root / "README.md").read_text(encoding="utf-8"),
        "log.md": (root / "dev" / "LOG.md").read_text(encoding="utf-8"),
    }
    plugins = Plugins.discover()
    reference = pages(Registry.discover(plugins), plugins)
    generated |= {f"reference/{path}": text for path, text in reference.items()}
    for path, text in generated.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are in the repository become links within the site."""
    for in_repository, in_site in {
        "](../dev/LOG.md": "](log.md",
        "](dev/LOG.md": "](log.md",
        "](../docs/": "](",
    }.items():
        markdown = markdown.replace(in_repository, in_site)
    return markdown.replace("](docs/", "](") if page.file.src_uri in ("index.md", "log.md") else markdown
