"""`distill check-plugin`: runs all checks of one package, and prints a table or JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import click

from distill_authoring.conformance.suite import Result, Status, check
from distill_core import UserError, did_you_mean
from distill_core.tools import Plugins, Registry

_LIGHT = """\
import importlib, sys
module = importlib.import_module(sys.argv[1])
list(getattr(module, "distill_commands", list)())
print([name for name in ("torch", "torchvision", "pydantic", "numpy") if name in sys.modules])
"""


def check_package(package: str) -> list[Result]:
    """The checks of an entry point, or of all entry points of a package. Raises `UserError` where there is none."""
    plugins = Plugins.discover()
    names = [name for name, owner in plugins.packages.items() if package in (name, owner)]
    if not names:
        installed = sorted({*plugins.packages, *plugins.packages.values()})
        hint = did_you_mean(package, installed) or "."
        raise UserError(f"no plugin or package {package!r}{hint} Is it installed in this environment? pip install -e .")
    entries = [entry for entry in Registry.discover(plugins).entries.values() if entry.plugin in names]
    cases = plugins.conformance_cases()
    results = [result for name in names for result in _plugin(plugins, name)]
    if not entries:
        results.append(Result("plugin", package, "components", "It has components.", "skipped", "it has only commands"))
    return results + [result for entry in entries for result in check(entry.cls, cases=cases)]


def _plugin(plugins: Plugins, name: str) -> list[Result]:
    module = plugins.manager.get_plugin(name)
    where = str(getattr(module, "__name__", name))

    def result(check: str, about: str, problem: str) -> Result:
        status: Status = "failed" if problem else "ok"
        return Result("plugin", name, check, about, status, problem)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _LIGHT, where]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    heavy = process.stdout.strip().strip("[]").replace("'", "")
    slow = f"importing {where} (or its commands) imports {heavy}: import inside the hook and inside commands"
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}, with no output"]
        slow = f"importing {where} fails in a fresh process: {lines[-1]}"
    undocumented = [command.name for _, _, command in plugins.call("distill_commands") if not command.help]
    return [
        result(
            "version",
            "The plugin declares the API version that it was written for.",
            "" if hasattr(module, "distill_api") else f"write `distill_api = 2` in {where}",
        ),
        result(
            "light",
            "Importing the plugin imports nothing heavy: `distill --help` loads every plugin.",
            slow if heavy or process.returncode else "",
        ),
        result(
            "commands",
            "Commands have a help text.",
            f"write a docstring for the command(s) {', '.join(map(str, undocumented))}" if undocumented else "",
        ),
    ]


_SIGNS = {"ok": ("ok", "green"), "failed": ("FAILED", "red"), "skipped": ("-", None)}


def print_results(results: Sequence[Result]) -> None:
    """Print a row for each check, what to fix below failed ones, and a line of counts.

    A message that several checks of a component have is printed with the first; the others name that check.
    """
    names = [f"{result.kind} {result.name}" for result in results]
    widths = max(map(len, names)), max(len(result.check) for result in results)
    previous = ""
    first: dict[tuple[str, str], str] = {}  # (component, message) -> check
    for name, result in zip(names, results, strict=True):
        sign, colour = _SIGNS[result.status]
        label = "" if name == previous else name
        previous = name
        row = f"{label:<{widths[0]}}  {result.check:<{widths[1]}}  {click.style(sign, fg=colour)}"
        origin = first.setdefault((name, result.message), result.check)
        if result.status != "ok" and origin != result.check:
            row += f"  as {origin}"
        elif result.status == "skipped":
            row += f"  {result.message}"
        click.echo(row)
        if result.status == "failed" and origin == result.check:
            click.echo(f"    requires: {result.about}\n    to fix:   {result.message}")
    counts = {status: sum(result.status == status for result in results) for status in _SIGNS}
    components = len({name for name in names if not name.startswith("plugin ")})
    click.echo(
        f"{components} component(s): {counts['ok']} checks passed, {counts['skipped']} not applicable, "
        f"{counts['failed']} failed"
    )


def as_json(results: Sequence[Result]) -> str:
    """The results as a JSON list."""
    return json.dumps([result.to_dict() for result in results], indent=1)
