"""`distill ui`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import click

from distill_core.tools import completion


@click.command()
@click.argument("runs", default="runs", shell_complete=completion.run_folders)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=43800, show_default=True, help="Port to listen on; 0 chooses a free one.")
def ui(runs: str, host: str, port: int) -> None:
    """Open runs in Aim: RUNS is a folder of runs, or a single run, whose page is printed."""
    from distill_core import UserError

    if importlib.util.find_spec("aim") is None:
        raise UserError("distill ui needs the package aim: pip install aim (it does not run on Windows)")
    repo, page = where(Path(runs))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port}: {error.strerror or error}; give another with --port") from error
        port = probe.getsockname()[1]
    click.echo(f"http://{host}:{port}{page}  (Aim on {repo / '.aim'}; it takes some seconds; Ctrl-C ends it)")
    sys.stdout.flush()
    arguments = ["up", "--repo", str(repo), "--host", host, "--port", str(port), "--workers", "1", "--yes"]
    from distill_aim.server import serve

    sys.exit(serve(arguments))


def where(runs: Path) -> tuple[Path, str]:
    """(folder of the repository, page to open) of a folder of runs or of a run. Raises `UserError`."""
    from distill_core import UserError

    memory = runs / "aim.json"
    if memory.is_file():
        known = json.loads(memory.read_text(encoding="utf-8"))
        repo, page = Path(known["repo"]), f"/runs/{known['run']}"
        # runs that were moved together with their repository
        repo = repo if (repo / ".aim").is_dir() else runs.absolute().parent
    else:
        repo, page = runs, "/runs"
    if not (repo / ".aim").is_dir():
        raise UserError(
            f"{repo}: no Aim repository (.aim) in it. Runs with the tracker aim, which is the default, make one in "
            "their --runs folder; `tracking.repo` puts it elsewhere: name that folder."
        )
    return repo.absolute(), page
