"""`distill doctor`: describes this machine and installation, and reports problems.

Plugins add their own diagnostics through the hook `distill_diagnostics`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_core.contracts.diagnostic import Diagnostic
from distill_core.errors import PluginError

if TYPE_CHECKING:
    from distill_core.registry import Plugins


def diagnose(runs: Path) -> Iterator[Diagnostic]:
    """All diagnostics, section by section. Imports torch; reads no data and writes nothing."""
    yield from _versions()
    yield from _device()
    yield from _plugins()
    yield from _disk(runs)


def _versions() -> Iterator[Diagnostic]:
    from distill_core.run.environment import PACKAGES, installed

    yield Diagnostic("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        yield Diagnostic("versions", package, installed(package) or "not installed")


def _device() -> Iterator[Diagnostic]:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            import torch
        except Exception as error:
            yield Diagnostic(
                "device", "torch", "cannot be imported", f"{type(error).__name__}: {error}. Install torch.", broken=True
            )
            return
        from distill_core.run.environment import device_name
        from distill_core.system.process import cores

        cuda = torch.cuda.is_available()
        yield Diagnostic("device", "cpu", device_name(torch.device("cpu")).removeprefix("cpu (").removesuffix(")"))
        limit = f", OMP_NUM_THREADS={omp}" if (omp := os.environ.get("OMP_NUM_THREADS")) else ""
        yield Diagnostic("device", "threads", f"{torch.get_num_threads()} of torch, {cores()} cores to use{limit}")
        if cuda:
            for i in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(i)
                bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
                memory = f"{properties.total_memory / 1e9:.0f} GB"
                yield Diagnostic(
                    "device",
                    f"cuda:{i}",
                    f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}, {bf16}",
                )
        else:
            built = torch.version.cuda or torch.version.hip
            yield Diagnostic(
                "device", "cuda", f"none: {'torch sees no GPU' if built else 'this torch is built for the CPU alone'}"
            )
        if torch.distributed.is_available():
            backends = [b for b in ("gloo", "nccl") if getattr(torch.distributed, f"is_{b}_available")()]
            yield Diagnostic("device", "torch.distributed", ", ".join(backends) or "no backend")
        else:
            yield Diagnostic("device", "torch.distributed", "no", "runs on one process only: torch is built without it")
    for warning in dict.fromkeys(str(w.message) for w in records):
        yield Diagnostic("device", "torch", "warns", warning)


def _plugins() -> Iterator[Diagnostic]:
    """Each plugin with its package, and the diagnostics that plugins provide."""
    from distill_core import API_VERSION
    from distill_core.registry import Plugins, Registry

    try:
        plugins = Plugins.discover()
    except PluginError as error:
        yield Diagnostic("plugins", "-", "cannot be loaded", str(error), broken=True)
        return
    counts: dict[str, int] = {}
    problem = None
    try:
        for entry in Registry.discover(plugins).entries.values():
            counts[entry.plugin] = counts.get(entry.plugin, 0) + 1
    except PluginError as error:
        problem = str(error)
    for name, package in plugins.packages.items():
        try:
            release = version(package)
        except PackageNotFoundError:
            release = "?"
        count = counts.get(name, 0)
        many = f", {count} component{'s' * (count != 1)}" if problem is None else ""
        yield Diagnostic("plugins", name, f"{package} {release}, hooks of version {API_VERSION}{many}")
    if problem is not None:
        yield Diagnostic("plugins", "-", "cannot be used", problem, broken=True)
    yield from _plugin_diagnostics(plugins)


def _plugin_diagnostics(plugins: Plugins) -> Iterator[Diagnostic]:
    for implementation in plugins.manager.hook.distill_diagnostics.get_hookimpls():
        try:
            rows: Any = implementation.function()
            yield from rows
        except Exception as error:  # must not hide the other plugins' diagnostics
            name = implementation.plugin_name
            why = f"{type(error).__name__}: {error}. Repair or uninstall {plugins.packages[name]}."
            yield Diagnostic("plugins", name, "its diagnostics fail", why)


def _disk(runs: Path) -> Iterator[Diagnostic]:
    from distill_core.system.files import cache_folder, free_at, in_words, size_of

    for name, folder in (("runs", runs), ("cache", cache_folder())):
        free = free_at(folder)
        low = f"less than 2 GB are free: checkpoints of {folder} may not fit" if free < 2e9 else ""
        used = in_words(size_of(folder)) if folder.is_dir() else "does not exist yet"
        yield Diagnostic("disk", name, f"{folder}: {used}, {in_words(free)} free", low)
        parent = folder
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            yield Diagnostic("disk", name, f"{parent}: read-only", "cannot be written to; choose another place")


def as_json(rows: list[Diagnostic]) -> str:
    """The diagnostics as a JSON list of objects, in order."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def print_all(rows: list[Diagnostic]) -> None:
    """Sections with aligned names. A terminal wraps long values below themselves; piped, each is one line."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    indent = max(len(row.name) for row in rows) + 4
    section = None
    for row in rows:
        if row.section != section:
            console.print(row.section, style="bold", markup=False, highlight=False)
            section = row.section
        texts = [(f"  {row.name}".ljust(indent), row.value, "")]
        if row.warning:
            texts.append((" " * indent, f"{'error' if row.broken else 'warning'}: {row.warning}", "yellow"))
        for head, text, style in texts:
            lines = textwrap.wrap(text, max(20, console.width - indent)) if console.is_terminal else [text]
            for line in lines or [""]:
                console.print(head, end="", markup=False, highlight=False)
                console.print(line, style=style, markup=False, highlight=False)
                head = " " * indent
