"""What tools may import beside `distill_core`: commands, studies, authors' tools, bench, export.

A component needs none of it. Names are loaded when first used: a plugin's commands, which `distill --help` asks for,
may import from here without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_core import hookspecs as hookspecs
    from distill_core.cli import cli as cli
    from distill_core.cli import main as main
    from distill_core.commands import catalogue as catalogue
    from distill_core.commands import completion as completion
    from distill_core.commands.catalogue import summary as summary
    from distill_core.commands.options import slurm_option as slurm_option
    from distill_core.commands.options import slurm_parameters as slurm_parameters
    from distill_core.commands.options import without_option as without_option
    from distill_core.contracts.cases import ConformanceCases as ConformanceCases
    from distill_core.contracts.nested import needs_of as needs_of
    from distill_core.contracts.nested import places_in as places_in
    from distill_core.contracts.nested import problems_of as problems_of
    from distill_core.contracts.nested import slots_in as slots_in
    from distill_core.contracts.slot import JSON_KEY as JSON_KEY
    from distill_core.contracts.slot import NONE as NONE
    from distill_core.contracts.slot import UNNAMED_KEY as UNNAMED_KEY
    from distill_core.contracts.slot import Context as Context
    from distill_core.data.batches import SampleViews as SampleViews
    from distill_core.data.example import example_batch as example_batch
    from distill_core.data.lengths import measure as measure
    from distill_core.data.opening import is_local as is_local
    from distill_core.data.shard import retry as retry
    from distill_core.errors import KeyPath as KeyPath
    from distill_core.errors import RecipeErrors as RecipeErrors
    from distill_core.errors import TrainingStopped as TrainingStopped
    from distill_core.errors import option_message as option_message
    from distill_core.errors import warn as warn
    from distill_core.evaluate.score import TaskScore as TaskScore
    from distill_core.evaluate.score import by_address as by_address
    from distill_core.evaluate.score import headlines as headlines
    from distill_core.evaluate.score import means as means
    from distill_core.evaluate.score import parse_address as parse_address
    from distill_core.evaluate.score import read_scores as read_scores
    from distill_core.model import evaluating as evaluating
    from distill_core.parallel import compile_unit as compile_unit
    from distill_core.parallel import compile_units as compile_units
    from distill_core.parallel import lay_out as lay_out
    from distill_core.parallel import one_graph_each as one_graph_each
    from distill_core.recipe.build import build_objective as build_objective
    from distill_core.recipe.document import Document as Document
    from distill_core.recipe.document import located as located
    from distill_core.recipe.document import read_document as read_document
    from distill_core.recipe.document import read_file as read_file
    from distill_core.recipe.named import recipe_file as recipe_file
    from distill_core.recipe.named_source import read_source as read_source
    from distill_core.recipe.needs import unmet as unmet
    from distill_core.recipe.resolve import Override as Override
    from distill_core.recipe.resolve import load_recipe as load_recipe
    from distill_core.recipe.sections import ParallelConfig as ParallelConfig
    from distill_core.recipe.sections import Recipe as Recipe
    from distill_core.registry import Entry as Entry
    from distill_core.registry import Plugins as Plugins
    from distill_core.registry import Registry as Registry
    from distill_core.run.assembly import assemble as assemble
    from distill_core.run.assembly import prepare_process as prepare_process
    from distill_core.run.checkpoint import Checkpoints as Checkpoints
    from distill_core.run.environment import environment as environment
    from distill_core.run.environment import installed as installed
    from distill_core.run.folder import RunFolder as RunFolder
    from distill_core.run.folder import read_report as read_report
    from distill_core.run.load import load_model as load_model
    from distill_core.run.load import model_of as model_of
    from distill_core.run.load import run_recipe as run_recipe
    from distill_core.run.showcase import font_of as font_of
    from distill_core.run.showcase import sheet as sheet
    from distill_core.run.showcase import words as words
    from distill_core.run.tracking import TrackerThread as TrackerThread
    from distill_core.system.extras import project as project
    from distill_core.system.flops import flop_counter as flop_counter
    from distill_core.system.flops import has_formula as has_formula
    from distill_core.system.jobs import Process as Process
    from distill_core.system.jobs import Slurm as Slurm
    from distill_core.system.jobs import Task as Task
    from distill_core.system.process import Interrupt as Interrupt
    from distill_core.system.process import arithmetic as arithmetic
    from distill_core.system.process import keep_freed_memory as keep_freed_memory
    from distill_core.system.process import resolve_device as resolve_device
    from distill_core.system.process import set_matmul_precision as set_matmul_precision
    from distill_core.system.transfer import Uploads as Uploads
    from distill_core.system.without_values import WithoutValues as WithoutValues

HOMES = {
    "hookspecs": "distill_core",
    "cli": "distill_core.cli",
    "main": "distill_core.cli",
    "catalogue": "distill_core.commands",
    "completion": "distill_core.commands",
    "summary": "distill_core.commands.catalogue",
    "slurm_option": "distill_core.commands.options",
    "slurm_parameters": "distill_core.commands.options",
    "without_option": "distill_core.commands.options",
    "ConformanceCases": "distill_core.contracts.cases",
    "Context": "distill_core.contracts.slot",
    "needs_of": "distill_core.contracts.nested",
    "places_in": "distill_core.contracts.nested",
    "problems_of": "distill_core.contracts.nested",
    "slots_in": "distill_core.contracts.nested",
    "JSON_KEY": "distill_core.contracts.slot",
    "NONE": "distill_core.contracts.slot",
    "UNNAMED_KEY": "distill_core.contracts.slot",
    "SampleViews": "distill_core.data.batches",
    "example_batch": "distill_core.data.example",
    "measure": "distill_core.data.lengths",
    "retry": "distill_core.data.shard",
    "is_local": "distill_core.data.opening",
    "KeyPath": "distill_core.errors",
    "RecipeErrors": "distill_core.errors",
    "option_message": "distill_core.errors",
    "TrainingStopped": "distill_core.errors",
    "warn": "distill_core.errors",
    "by_address": "distill_core.evaluate.score",
    "headlines": "distill_core.evaluate.score",
    "means": "distill_core.evaluate.score",
    "parse_address": "distill_core.evaluate.score",
    "read_scores": "distill_core.evaluate.score",
    "TaskScore": "distill_core.evaluate.score",
    "evaluating": "distill_core.model",
    "lay_out": "distill_core.parallel",
    "compile_unit": "distill_core.parallel",
    "compile_units": "distill_core.parallel",
    "one_graph_each": "distill_core.parallel",
    "build_objective": "distill_core.recipe.build",
    "unmet": "distill_core.recipe.needs",
    "Document": "distill_core.recipe.document",
    "located": "distill_core.recipe.document",
    "read_document": "distill_core.recipe.document",
    "read_file": "distill_core.recipe.document",
    "recipe_file": "distill_core.recipe.named",
    "read_source": "distill_core.recipe.named_source",
    "load_recipe": "distill_core.recipe.resolve",
    "Override": "distill_core.recipe.resolve",
    "ParallelConfig": "distill_core.recipe.sections",
    "Recipe": "distill_core.recipe.sections",
    "Entry": "distill_core.registry",
    "Plugins": "distill_core.registry",
    "Registry": "distill_core.registry",
    "assemble": "distill_core.run.assembly",
    "prepare_process": "distill_core.run.assembly",
    "Uploads": "distill_core.system.transfer",
    "Checkpoints": "distill_core.run.checkpoint",
    "environment": "distill_core.run.environment",
    "installed": "distill_core.run.environment",
    "read_report": "distill_core.run.folder",
    "RunFolder": "distill_core.run.folder",
    "load_model": "distill_core.run.load",
    "model_of": "distill_core.run.load",
    "run_recipe": "distill_core.run.load",
    "font_of": "distill_core.run.showcase",
    "sheet": "distill_core.run.showcase",
    "words": "distill_core.run.showcase",
    "TrackerThread": "distill_core.run.tracking",
    "project": "distill_core.system.extras",
    "flop_counter": "distill_core.system.flops",
    "has_formula": "distill_core.system.flops",
    "Process": "distill_core.system.jobs",
    "Slurm": "distill_core.system.jobs",
    "Task": "distill_core.system.jobs",
    "arithmetic": "distill_core.system.process",
    "Interrupt": "distill_core.system.process",
    "keep_freed_memory": "distill_core.system.process",
    "resolve_device": "distill_core.system.process",
    "set_matmul_precision": "distill_core.system.process",
    "WithoutValues": "distill_core.system.without_values",
}
"""Each name -> the module that defines it, or the package whose module it is."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'distill_core.tools' has no attribute {name!r}")
    home = import_module(HOMES[name])
    return getattr(home, name) if hasattr(home, name) else import_module(f"{HOMES[name]}.{name}")
