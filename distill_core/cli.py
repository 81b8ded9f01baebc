"""The command line. Nothing heavy is imported until a command needs it: `distill --help` imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_core import __version__
from distill_core.commands import completion
from distill_core.commands.options import json_option, leave_out, named_without, slurm_option, without_option
from distill_core.commands.recipes import recipes
from distill_core.errors import OtherRankFailed, UserError, warn

if TYPE_CHECKING:
    from distill_core.recipe.sections import Recipe
    from distill_core.registry import Registry

SET_HELP = "Change the recipe: path=value, as loss.1.weight=0.5 or 'data.source={name: emoji}'. Repeatable."
SET = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help=SET_HELP, shell_complete=completion.set_paths
)
CHECKPOINT = click.option(
    "--checkpoint",
    default="last",
    show_default=True,
    help="`last`, `best`, or a step's number.",
    shell_complete=completion.checkpoints,
)
NPROC = click.option(
    "--nproc",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use N processes (ranks) on this machine, or on each of a SLURM job's; each has a GPU of its own, if any.",
)
ARGUMENTS = "distill_core.arguments"
"""In a context's `meta`: what follows `distill` on the command line."""


class _PipeClosed(Exception):
    """The reader of our output has closed it. (click and rich would each turn this into exit code 1.)"""


class _Commands(click.Group):
    """The built-in commands and those of plugins."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _PipeClosed from error
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):
                raise _PipeClosed from end
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        leave_out(ctx, named_without(args))  # before the commands of plugins are looked for
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(self._plugin_commands())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, name) or self._plugin_commands().get(name)

    def _plugin_commands(self) -> dict[str, click.Command]:
        from distill_core.registry import Plugins

        commands: dict[str, click.Command] = {}
        for command in Plugins.discover().commands():
            group = commands.get(command.name)
            if isinstance(group, click.Group) and isinstance(command, click.Group):
                group.commands.update(command.commands)  # plugins extend one group, as `bench`
            elif command.name not in self.commands:
                commands[command.name] = command
        return commands


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distill")
@without_option
def cli() -> None:
    """Multimodal self-distillation from a YAML recipe.

    Exit codes: 0 done; 1 a check failed (check-plugin); 2 an error in the command, the recipe or the data;
    3 training cannot continue; 4 another rank failed; 128 + the signal's number when interrupted (the run is saved).
    """


cli.add_command(recipes)


def _registry() -> Registry:
    from distill_core.registry import Registry

    registry = Registry.discover()
    completion.update_cache(registry)
    return registry


def _load(
    recipe: str, overrides: Sequence[str], registry: Registry, *, allow_unset: bool = False, warns: bool = True
) -> Recipe:
    from distill_core.recipe.resolve import load_recipe

    loaded = load_recipe(recipe, registry=registry, overrides=overrides, allow_unset=allow_unset)
    for warning in loaded.warnings if warns and os.environ.get("RANK", "0") == "0" else ():
        warn(warning)
    return loaded


def _start_ranks(nproc: int | None, recipe: Callable[[], Recipe]) -> None:
    """Where `--nproc` asks for it: check the recipe, run this command line again as ranks, and exit as they do."""
    from distill_core.system import ranks

    if nproc is not None and ranks.are_to_start(nproc):
        ranks.require_devices(nproc, recipe().train.device)
        sys.exit(ranks.start_ranks(nproc, click.get_current_context().meta[ARGUMENTS]))


@cli.command()
@click.argument("recipe", shell_complete=completion.recipes)
@SET
@click.option("--runs", default="runs", show_default=True, help="Folder in which the run's folder is created.")
@NPROC
@slurm_option
@click.option("--quiet", is_flag=True, help="Print only warnings and the final table.")
@without_option
def run(
    recipe: str, overrides: tuple[str, ...], runs: str, nproc: int | None, slurm: tuple[str, ...], quiet: bool
) -> None:
    """Train a recipe, evaluate it, and report. With --slurm, submit a job that does."""
    registry = _registry()
    if not slurm:
        _start_ranks(nproc, lambda: _load(recipe, overrides, registry, warns=False))
    loaded = _load(recipe, overrides, registry)
    from distill_core.commands import training

    if slurm:
        training.submit_new(loaded, Path(runs), slurm, nproc, quiet=quiet)
        return
    training.run(loaded, Path(runs), registry, quiet=quiet)


@cli.command()
@click.argument("folder", shell_complete=completion.run_folders)
@CHECKPOINT
@NPROC
@slurm_option
@click.option("--quiet", is_flag=True, help="Print only warnings and the final table.")
@without_option
def resume(folder: str, checkpoint: str, nproc: int | None, slurm: tuple[str, ...], quiet: bool) -> None:
    """Continue a stopped run from its last checkpoint, exactly as if it had not stopped.

    A run that is finished and scored is left unchanged.
    """
    registry = _registry()
    from distill_core.commands import training
    from distill_core.run.load import run_recipe

    if slurm:
        run_recipe(Path(folder), registry)
        if checkpoint != "last":
            raise UserError("--slurm: leave --checkpoint out; a job that is queued again would go back again")
        training.submit(Path(folder), slurm, nproc, quiet=quiet)
        return
    _start_ranks(nproc, lambda: run_recipe(Path(folder), registry))
    training.resume(Path(folder), checkpoint, registry, quiet=quiet)


@cli.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--passes", type=click.IntRange(min=1), help="Over the data; by default as many as the recipe trains.")
@SET
@NPROC
@click.option("--quiet", is_flag=True, help="No progress bar.")
@without_option
def teach(recipe: str, passes: int | None, overrides: tuple[str, ...], nproc: int | None, quiet: bool) -> None:
    """Write the features of a recipe's teachers that have a `cache`, of the views of every pass, for runs to read.

    If it is stopped, the same command continues; with more --passes it adds to what is there.
    """
    registry = _registry()
    _start_ranks(nproc, lambda: _load(recipe, overrides, registry, warns=False))
    loaded = _load(recipe, overrides, registry)
    from distill_core.commands import training

    training.teach(loaded, passes, quiet=quiet)


@cli.command()
@click.argument("folder", metavar="RUN", shell_complete=completion.run_folders)
@click.option("--step", type=int, required=True, help="The step, as in metrics.jsonl.")
@SET
@NPROC
@click.option("--quiet", is_flag=True, help="No progress bar.")
@json_option
@without_option
def replay(folder: str, step: int, overrides: tuple[str, ...], nproc: int | None, quiet: bool, as_json: bool) -> None:
    """Run one step of a run again, and say what in it was not finite.

    With the same samples, views, weights and random numbers, from the nearest checkpoint before it: its loss is the one
    in metrics.jsonl. RUN is only read. --set changes the recipe, for a try: train.precision=fp32.
    """
    from distill_core.commands import replay as command
    from distill_core.run.load import run_recipe

    registry = _registry()
    _start_ranks(nproc, lambda: run_recipe(Path(folder), registry, overrides))
    command.replay(Path(folder), step, overrides, registry, quiet=quiet, as_json=as_json)


@cli.command("eval")
@click.argument("run", shell_complete=completion.run_folders)
@CHECKPOINT
@click.option("--split", help="Split to score; by default `evaluate.split` of the recipe.")
@click.option(
    "--task", "tasks", multiple=True, help="A task: the id of one in the recipe, or {name: ..., ...}. Repeatable."
)
@SET
@click.option("--full", is_flag=True, help="Print every score of every set, not only means over sets.")
@click.option(
    "--pictures", metavar="FOLDER", help="Write the tasks' pictures as PNG files: matches, confusion matrices."
)
@click.option(
    "--cache/--no-cache", default=True, help="Reuse and store embeddings in RUN/embeddings.  [default: cache]"
)
@NPROC
@click.option("--quiet", is_flag=True, help="No progress bar.")
@json_option
@without_option
def evaluate_run(run: str, nproc: int | None, **options: Any) -> None:
    """Score a run's checkpoint with the recipe's evaluation tasks, or with others.

    RUN is the run's folder, or a file in its checkpoints. The scores are also saved in RUN/evaluations.

    A task may have its own data: --task '{name: retrieval, source: {name: ..., ...}}' (docs/evaluation.md).
    """
    from distill_core.commands.evaluate import recipe_to_score, score

    registry = _registry()
    _start_ranks(nproc, lambda: recipe_to_score(run, registry, **options))
    score(run, registry, **options)


@cli.command()
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@SET
@click.option("--quiet", is_flag=True, help="Print only errors.")
@json_option
@without_option
def validate(recipes: tuple[str, ...], overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Check recipes without reading data or weights, and print every error.

    A device that is not available here is a warning: a recipe may be checked on another machine than it runs on.
    """
    from distill_core.recipe.resolve import load_recipe
    from distill_core.system.process import resolve_device

    registry = _registry()
    rows = []
    for name in recipes:
        errors: list[str] = []
        warnings: list[str] = []
        try:
            loaded = load_recipe(name, registry=registry, overrides=overrides, allow_unset=True)
        except UserError as error:
            errors += str(error).splitlines()
        else:
            warnings += loaded.warnings
            try:
                resolve_device(loaded.train.device)
            except UserError as error:
                warnings.append(f"{name}: {error}")
        rows.append({"recipe": name, "ok": not errors, "errors": errors, "warnings": warnings})
        if not as_json:
            for line in [*errors, *(f"warning: {warning}" for warning in warnings if not quiet)]:
                click.echo(line, err=True)
            if not errors and not quiet:
                click.echo(f"{name}: ok")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    if not all(row["ok"] for row in rows):
        sys.exit(UserError.exit_code)


@cli.command()
@click.argument("recipe", shell_complete=completion.recipes)
@SET
@json_option
@without_option
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every default filled in; the output is a recipe itself."""
    loaded = _load(recipe, overrides, _registry(), allow_unset=True)
    if as_json:
        click.echo(json.dumps(loaded.to_dict(), indent=1))
    else:
        click.echo(loaded.to_yaml(), nl=False)


@cli.command()
@click.option("--runs", default="runs", show_default=True, help="Folder of runs whose disk space is reported.")
@json_option
@without_option
def doctor(runs: str, as_json: bool) -> None:
    """Report versions, devices, plugins, kernels, data and disk space, and any problems with them."""
    from distill_core.commands import doctor as command

    rows = list(command.diagnose(Path(runs)))
    click.echo(command.as_json(rows)) if as_json else command.print_all(rows)
    if any(row.broken for row in rows):
        sys.exit(UserError.exit_code)


@cli.command()
@click.argument("name", required=False, shell_complete=completion.components)
@json_option
@without_option
def plugins(name: str | None, as_json: bool) -> None:
    """List every component, or show one component's options."""
    from distill_core.commands import catalogue

    registry = _registry()
    if as_json:
        click.echo(catalogue.as_json(registry, name))
    else:
        catalogue.print_all(registry) if name is None else catalogue.print_one(registry, name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a `UserError` is printed as it is, without a traceback."""
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if isinstance(error, OtherRankFailed):
            if error.speaks:
                click.echo(f"rank {rank}: {error}", err=True)
        elif rank == "0":
            click.echo(str(error), err=True)
        elif not error.everywhere:
            click.echo(f"rank {rank}: {error}", err=True)
        sys.exit(error.exit_code)
    except _PipeClosed:
        _close_stdout()
        sys.exit(141)


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
