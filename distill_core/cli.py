"""The command line. Nothing heavy is imported until a command needs it: `distill --help` imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_core import __version__
from distill_core.commands import completion
from distill_core.commands.options import leave_out, named_without, without_option
from distill_core.commands.recipes import recipes
from distill_core.errors import UserError, counted

if TYPE_CHECKING:
    from distill_core.recipe.sections import Recipe
    from distill_core.registry import Registry
    from distill_core.train import Result

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
JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


class _PipeClosed(Exception):
    """The reader of our output went away. (click and rich would each make of it exit code 1.)"""


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
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(self._plugin_commands())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, name) or self._plugin_commands().get(name)

    def _plugin_commands(self) -> dict[str, click.Command]:
        from distill_core.registry import Plugins

        found: dict[str, click.Command] = {}
        for command in Plugins.discover().commands():
            group = found.get(command.name)
            if isinstance(group, click.Group) and isinstance(command, click.Group):
                group.commands.update(command.commands)  # plugins extend one group, as `bench`
            elif command.name not in self.commands:
                found[command.name] = command
        return found


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="distill")
@without_option
def cli() -> None:
    """Multimodal self-distillation from a YAML recipe.

    Exit codes: 0 done; 1 a check failed (check-plugin); 2 something to mend in what was asked for; 3 training cannot go
    on; 128 + the signal's number when interrupted (the run is saved).
    """


cli.add_command(recipes)


def _registry() -> Registry:
    from distill_core.registry import Registry

    registry = Registry.discover()
    completion.remember(registry)
    return registry


def _load(recipe: str, overrides: Sequence[str], *, allow_unset: bool = False) -> Recipe:
    from distill_core.recipe.resolve import load_recipe

    loaded = load_recipe(recipe, registry=_registry(), overrides=overrides, allow_unset=allow_unset)
    for warning in loaded.warnings if os.environ.get("RANK", "0") == "0" else ():
        click.echo(f"warning: {warning}", err=True)
    return loaded


@cli.command()
@click.argument("recipe", shell_complete=completion.recipes)
@SET
@click.option("--runs", default="runs", show_default=True, help="Folder that the run's folder is made in.")
@click.option("--quiet", is_flag=True, help="Only warnings and the table at the end.")
@without_option
def run(recipe: str, overrides: tuple[str, ...], runs: str, quiet: bool) -> None:
    """Train a recipe, evaluate it, and report."""
    loaded = _load(recipe, overrides)
    from distill_core.run.checkpoint import Checkpoints
    from distill_core.run.folder import RunFolder
    from distill_core.system import distributed
    from distill_core.system.process import resolve_device
    from distill_core.train import Trainer

    distributed.start(resolve_device(loaded.train.device))
    begun = made = None
    if distributed.rank() == 0:
        launch = distributed.launch()
        if launch is not None and distributed.restarted():
            begun = RunFolder.of_launch(Path(runs), loaded, launch)
        if begun is None:
            made = RunFolder.create(Path(runs), loaded, launch)
    saved = begun is not None and bool(Checkpoints(begun.path).steps())
    if begun is not None:
        click.echo(f"{begun.path}: restarted by torchrun, so this run is continued", err=True)
        if not saved:
            begun.rewind(0, 0)
    # one folder for all ranks
    folder, saved = distributed.gather_objects((begun or made, saved))[0]
    if saved:
        _continue(folder.path, "last", quiet)
        return
    if made is not None and made.path.name != loaded.name:
        click.echo(f"{Path(runs) / loaded.name} exists; this run is {made.path}", err=True)
    trainer = None
    try:
        trainer = Trainer(loaded, folder, quiet=quiet)
        result = trainer.run()
    except BaseException:
        if made is not None and (trainer is None or trainer.step == 0):
            _forget(made.path)
        raise
    _end(result)


def _forget(folder: Path) -> None:
    """Take back the folder of a run that has not made its first step; one with a checkpoint is kept."""
    import shutil

    if not any((folder / "checkpoints").glob("*.pt")):
        shutil.rmtree(folder, ignore_errors=True)


@cli.command()
@click.argument("folder", shell_complete=completion.run_folders)
@CHECKPOINT
@click.option("--quiet", is_flag=True, help="Only warnings and the table at the end.")
@without_option
def resume(folder: str, checkpoint: str, quiet: bool) -> None:
    """Go on with a run that was stopped, from its last checkpoint, exactly as if it had not been.

    One that is finished and scored is left as it is.
    """
    _continue(Path(folder), checkpoint, quiet)


def _continue(folder: Path, checkpoint: str, quiet: bool) -> None:
    from distill_core.run.checkpoint import Checkpoints
    from distill_core.run.folder import RunFolder, read_report
    from distill_core.run.load import run_recipe
    from distill_core.train import Trainer

    recipe = run_recipe(folder, _registry())
    report = read_report(folder)
    # a task that failed is tried again; steps that the recipe asks for since, or whose checkpoint is gone, are made
    if checkpoint == "last" and report is not None and not report.get("failed"):
        steps: int = report["steps"]
        if recipe.train.steps in (None, steps) and Checkpoints(folder).steps()[-1:] == [steps]:
            if os.environ.get("RANK", "0") == "0":
                scored = f"finished at step {steps}; its scores: {folder / 'report.json'}"
                click.echo(f"{folder}: {scored}. Score it again with: distill eval {folder}", err=True)
            return
    _end(Trainer(recipe, RunFolder(folder), resume=checkpoint, quiet=quiet).run())


def _end(result: Result) -> None:
    from distill_core.run.display import per_second, print_scores
    from distill_core.system import distributed

    rank = distributed.rank()
    if result.signal is None:
        distributed.barrier()  # one that left while the first still wrote was seen to abort
    distributed.stop()
    if result.signal is not None:
        sys.exit(128 + result.signal)
    if rank == 0:
        import json

        report = json.loads((result.folder / "report.json").read_text())
        lines = [
            f"{counted(report['steps'], 'step')}, {counted(report['samples'], 'sample')} in {report['seconds']:.0f} s "
            f"of training ({per_second(report['samples_per_s'] or 0)})",
        ]
        if report["skipped_reads"]:
            shards = f" and {counted(report['skipped_shards'], 'shard')}" if report["skipped_shards"] else ""
            lines.append(
                f"skipped: {counted(report['skipped_samples'], 'sample')}{shards} that could not be used, "
                f"{counted(report['skipped_reads'], 'time')} over all passes; keys: {result.folder / 'skipped.jsonl'}"
            )
        if report["skipped_steps"]:
            steps = counted(report["skipped_steps"], "step")
            lines.append(f"skipped: {steps} not finite; see {result.folder / 'metrics.jsonl'}")
        lines.append(f"picture: {result.folder / 'report.png'}")
        file = str(result.folder / "report.json")
        print_scores(result.scores, f"{report['name']} on {report['split']}", lines, notes=report["notes"], file=file)
        if result.unsaved is not None:
            raise UserError(f"{result.unsaved}. Make room, then: distill resume {result.folder}")
        if result.failed:
            raise UserError(
                f"{len(result.failed)} evaluation task(s) failed, as warned above. The run is complete; score it again "
                f"with distill eval {result.folder} --set evaluate.tasks=..."
            )


@cli.command("eval")
@click.argument("run", shell_complete=completion.run_folders)
@CHECKPOINT
@click.option("--split", help="Split to score; the recipe's test split otherwise.")
@click.option("--task", "tasks", multiple=True, help="A task of the recipe by its id, or any as {name: ..., ...}.")
@SET
@click.option("--full", is_flag=True, help="Every score of every set, not the means over sets alone.")
@click.option("--pictures", metavar="FOLDER", help="Write what tasks have to show as PNG files: matches, confusions.")
@click.option("--cache/--no-cache", default=True, help="Take and keep embeddings in RUN/embeddings.  [default: cache]")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@JSON
@without_option
def evaluate_run(run: str, **options: Any) -> None:
    """Score a run's checkpoint with the recipe's evaluation tasks, or with others.

    RUN is the run's folder, or a file in its checkpoints. The scores are kept in RUN/evaluations as well.

    A task may have data of its own: --task '{name: retrieval, source: {name: ..., ...}}' (docs/evaluation.md).
    """
    from distill_core.evaluate.command import score

    score(run, _registry(), **options)


@cli.command()
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@SET
@click.option("--quiet", is_flag=True, help="Only what is wrong.")
@JSON
@without_option
def validate(recipes: tuple[str, ...], overrides: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Check recipes without touching data or weights; prints every error.

    A device that is not available here is a warning: a recipe may be checked where it will not run.
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
        import json

        click.echo(json.dumps(rows, indent=1))
    if not all(row["ok"] for row in rows):
        sys.exit(UserError.exit_code)


@cli.command()
@click.argument("recipe", shell_complete=completion.recipes)
@SET
@JSON
@without_option
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every default filled in; the output is a recipe itself."""
    loaded = _load(recipe, overrides, allow_unset=True)
    if as_json:
        import json

        click.echo(json.dumps(loaded.to_dict(), indent=1))
    else:
        click.echo(loaded.to_yaml(), nl=False)


@cli.command()
@click.option("--runs", default="runs", show_default=True, help="Folder of runs, for the room there is.")
@JSON
@without_option
def doctor(runs: str, as_json: bool) -> None:
    """Say what is here, and what is amiss: versions, devices, plugins, kernels, data, disk."""
    from distill_core.commands.doctor import as_json as to_json
    from distill_core.commands.doctor import diagnose, print_all

    found = list(diagnose(Path(runs)))
    click.echo(to_json(found)) if as_json else print_all(found)
    if any(row.broken for row in found):
        sys.exit(UserError.exit_code)


@cli.command()
@click.argument("name", required=False, shell_complete=completion.components)
@JSON
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
        if rank == "0":
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
