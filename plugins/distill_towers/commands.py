"""`distill kernels`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import click


@click.command()
@click.option("--tune", is_flag=True, help="Measure every backend on this device, and let `auto` go by the result.")
@click.option("--device", default="auto", show_default=True, help="Device to tune for: auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def kernels(tune: bool, device: str, as_json: bool) -> None:
    """List the kernels' backends: which this machine can run, and why not the rest."""
    import json

    import torch

    from distill_core.errors import UserError
    from distill_kernels.backends import BackendError, listing, table_path

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if tune:
        from distill_kernels.tune import tune as measure

        try:
            path, times = measure(where)
        except BackendError as error:
            raise UserError(str(error)) from error
        if as_json:
            click.echo(json.dumps([dict(zip(("op", "inputs", "backend", "ms"), row, strict=True)) for row in times]))
            return
        for op, inputs, backend, milliseconds in times:
            click.echo(f"{op:24}{inputs:44}{backend:12}{milliseconds:10.3f} ms")
        click.echo(f"`auto` now goes by {path}")
        return
    rows = listing()
    if as_json:
        click.echo(json.dumps([dict(zip(("op", "backend", "runs"), row, strict=True)) for row in rows]))
        return
    previous = None
    for op, backend, answer in rows:
        click.echo(f"{op if op != previous else '':24}{backend:12}{answer}")
        previous = op
    path = table_path(where)
    click.echo(f"`auto` goes by {path if path.exists() else 'its built-in order (measure with --tune)'}")
