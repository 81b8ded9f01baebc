"""distill: a composable plugin framework for multimodal self-distillation.

All that a component may import stands here, and what is imported from here stays what it is as long as `API_VERSION`
does. Names are loaded when first used: `import distill_core` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distill_core.batch import GLOBAL as GLOBAL
    from distill_core.batch import LOCAL as LOCAL
    from distill_core.batch import REPEATED as REPEATED
    from distill_core.batch import Batch as Batch
    from distill_core.batch import Group as Group
    from distill_core.batch import Sample as Sample
    from distill_core.batch import Skipped as Skipped
    from distill_core.batch import View as View
    from distill_core.batch import Views as Views
    from distill_core.batch import stack_views as stack_views
    from distill_core.batch import with_extra as with_extra
    from distill_core.contracts.balance import Balance as Balance
    from distill_core.contracts.cases import ConformanceCase as ConformanceCase
    from distill_core.contracts.component import Component as Component
    from distill_core.contracts.component import ComponentConfig as ComponentConfig
    from distill_core.contracts.diagnostic import Diagnostic as Diagnostic
    from distill_core.contracts.hook import Computation as Computation
    from distill_core.contracts.hook import Hook as Hook
    from distill_core.contracts.masker import PREDICTED as PREDICTED
    from distill_core.contracts.masker import Mask as Mask
    from distill_core.contracts.masker import Masker as Masker
    from distill_core.contracts.masker import MaskerConfig as MaskerConfig
    from distill_core.contracts.media import Distribution as Distribution
    from distill_core.contracts.media import Media as Media
    from distill_core.contracts.media import Picture as Picture
    from distill_core.contracts.media import Rendered as Rendered
    from distill_core.contracts.media import TokenLayout as TokenLayout
    from distill_core.contracts.optimizer import DecoupledConfig as DecoupledConfig
    from distill_core.contracts.optimizer import DecoupledOptimizer as DecoupledOptimizer
    from distill_core.contracts.optimizer import Optimizer as Optimizer
    from distill_core.contracts.optional import ClassAttention as ClassAttention
    from distill_core.contracts.optional import DenseEmbeddings as DenseEmbeddings
    from distill_core.contracts.optional import Detokenizes as Detokenizes
    from distill_core.contracts.optional import LaidOutTokens as LaidOutTokens
    from distill_core.contracts.optional import TokenAttention as TokenAttention
    from distill_core.contracts.optional import TokenPooling as TokenPooling
    from distill_core.contracts.optional import offers as offers
    from distill_core.contracts.raw import Raw as Raw
    from distill_core.contracts.schedule import Cosine as Cosine
    from distill_core.contracts.schedule import Ramp as Ramp
    from distill_core.contracts.schedule import Schedule as Schedule
    from distill_core.contracts.schedule import Scheduled as Scheduled
    from distill_core.contracts.slot import Slot as Slot
    from distill_core.contracts.slot import default_component as default_component
    from distill_core.contracts.source import DataSource as DataSource
    from distill_core.contracts.task import Task as Task
    from distill_core.contracts.task import TaskConfig as TaskConfig
    from distill_core.contracts.teacher import Teacher as Teacher
    from distill_core.contracts.teacher import TeacherConfig as TeacherConfig
    from distill_core.contracts.teacher import TeacherReader as TeacherReader
    from distill_core.contracts.teacher import Visit as Visit
    from distill_core.contracts.tracker import Tracker as Tracker
    from distill_core.contracts.tracker import TrackerConfig as TrackerConfig
    from distill_core.contracts.weights import LoadReport as LoadReport
    from distill_core.contracts.weights import WeightLoader as WeightLoader
    from distill_core.data.order import stable_hash as stable_hash
    from distill_core.data.shard import Patience as Patience
    from distill_core.data.shard import Shard as Shard
    from distill_core.data.shard import ShardError as ShardError
    from distill_core.data.shard import Shards as Shards
    from distill_core.data.shard import Unusable as Unusable
    from distill_core.data.shard import load_index as load_index
    from distill_core.data.tar_shards import TarShard as TarShard
    from distill_core.data.tar_shards import tar_shards as tar_shards
    from distill_core.errors import AbsentModality as AbsentModality
    from distill_core.errors import BadSample as BadSample
    from distill_core.errors import DataError as DataError
    from distill_core.errors import StopRun as StopRun
    from distill_core.errors import UserError as UserError
    from distill_core.errors import counted as counted
    from distill_core.errors import did_you_mean as did_you_mean
    from distill_core.evaluate.cache import fingerprint as fingerprint
    from distill_core.evaluate.cache import stamps as stamps
    from distill_core.evaluate.score import Score as Score
    from distill_core.evaluate.score import mean_over_sets as mean_over_sets
    from distill_core.evaluate.sets import EvaluationSet as EvaluationSet
    from distill_core.evaluate.sets import encode_shared as encode_shared
    from distill_core.interfaces import Augmentation as Augmentation
    from distill_core.interfaces import Backbone as Backbone
    from distill_core.interfaces import Collator as Collator
    from distill_core.interfaces import Decoder as Decoder
    from distill_core.interfaces import FusionHead as FusionHead
    from distill_core.interfaces import Head as Head
    from distill_core.interfaces import JointAugmentation as JointAugmentation
    from distill_core.interfaces import JointTower as JointTower
    from distill_core.interfaces import JointTowerConfig as JointTowerConfig
    from distill_core.interfaces import Loss as Loss
    from distill_core.interfaces import LossConfig as LossConfig
    from distill_core.interfaces import TowerInput as TowerInput
    from distill_core.model import FeatureKind as FeatureKind
    from distill_core.model import Model as Model
    from distill_core.objective import Losses as Losses
    from distill_core.objective import Objective as Objective
    from distill_core.outputs import Encoded as Encoded
    from distill_core.outputs import Features as Features
    from distill_core.outputs import Fused as Fused
    from distill_core.outputs import Fusion as Fusion
    from distill_core.outputs import Outputs as Outputs
    from distill_core.outputs import Progress as Progress
    from distill_core.outputs import Rows as Rows
    from distill_core.outputs import wide as wide
    from distill_core.plan import DEFAULT_TEACHER as DEFAULT_TEACHER
    from distill_core.plan import BackboneSpec as BackboneSpec
    from distill_core.plan import FieldPlan as FieldPlan
    from distill_core.plan import HeadPlan as HeadPlan
    from distill_core.plan import MaskPlan as MaskPlan
    from distill_core.plan import MissingModality as MissingModality
    from distill_core.plan import ModalityPlan as ModalityPlan
    from distill_core.plan import Needs as Needs
    from distill_core.plan import Plan as Plan
    from distill_core.plan import TeacherPlan as TeacherPlan
    from distill_core.plan import Vocabulary as Vocabulary
    from distill_core.plan import same_dim as same_dim
    from distill_core.presence import Presence as Presence
    from distill_core.presence import Present as Present
    from distill_core.recipe.sections import Recipe
    from distill_core.system.distributed import all_gather as all_gather
    from distill_core.system.distributed import gather_objects as gather_objects
    from distill_core.system.distributed import raise_on_all_ranks as raise_on_all_ranks
    from distill_core.system.distributed import rank as rank
    from distill_core.system.distributed import world_size as world_size
    from distill_core.system.extras import install as install
    from distill_core.system.extras import require_extra as require_extra
    from distill_core.system.files import cache_folder as cache_folder
    from distill_core.system.files import in_words as in_words
    from distill_core.system.files import make_room as make_room
    from distill_core.system.files import size_of as size_of
    from distill_core.system.files import write_whole as write_whole
    from distill_core.system.progress import progress_bar as progress_bar
    from distill_core.system.state_dicts import StateDict as StateDict
    from distill_core.system.state_dicts import read_folder as read_folder
    from distill_core.system.state_dicts import read_json as read_json
    from distill_core.system.state_dicts import read_state_dict as read_state_dict
    from distill_core.system.state_dicts import read_tensors as read_tensors
    from distill_core.system.state_dicts import unwrapped as unwrapped
    from distill_core.teachers.copies import CopiedTeacher as CopiedTeacher
    from distill_core.teachers.copies import CopyConfig as CopyConfig
    from distill_core.train import Callback as Callback
    from distill_core.train import Result as Result

__version__ = "0.1.0"

API_VERSION = 2
"""The version of the hooks and interfaces. A plugin states the one it was written for as `distill_api = 2`."""

hookimpl = pluggy.HookimplMarker("distill")
"""Marks a plugin's implementation of a hook of `distill_core.hookspecs`."""

HOMES = {
    "Batch": "distill_core.batch",
    "GLOBAL": "distill_core.batch",
    "Group": "distill_core.batch",
    "LOCAL": "distill_core.batch",
    "REPEATED": "distill_core.batch",
    "Sample": "distill_core.batch",
    "Skipped": "distill_core.batch",
    "View": "distill_core.batch",
    "Views": "distill_core.batch",
    "stack_views": "distill_core.batch",
    "with_extra": "distill_core.batch",
    "Balance": "distill_core.contracts.balance",
    "ConformanceCase": "distill_core.contracts.cases",
    "Component": "distill_core.contracts.component",
    "ComponentConfig": "distill_core.contracts.component",
    "Diagnostic": "distill_core.contracts.diagnostic",
    "Computation": "distill_core.contracts.hook",
    "Hook": "distill_core.contracts.hook",
    "Mask": "distill_core.contracts.masker",
    "Masker": "distill_core.contracts.masker",
    "MaskerConfig": "distill_core.contracts.masker",
    "PREDICTED": "distill_core.contracts.masker",
    "Distribution": "distill_core.contracts.media",
    "Media": "distill_core.contracts.media",
    "Picture": "distill_core.contracts.media",
    "Rendered": "distill_core.contracts.media",
    "TokenLayout": "distill_core.contracts.media",
    "DecoupledConfig": "distill_core.contracts.optimizer",
    "DecoupledOptimizer": "distill_core.contracts.optimizer",
    "Optimizer": "distill_core.contracts.optimizer",
    "ClassAttention": "distill_core.contracts.optional",
    "DenseEmbeddings": "distill_core.contracts.optional",
    "Detokenizes": "distill_core.contracts.optional",
    "LaidOutTokens": "distill_core.contracts.optional",
    "TokenAttention": "distill_core.contracts.optional",
    "TokenPooling": "distill_core.contracts.optional",
    "offers": "distill_core.contracts.optional",
    "Cosine": "distill_core.contracts.schedule",
    "Ramp": "distill_core.contracts.schedule",
    "Schedule": "distill_core.contracts.schedule",
    "Scheduled": "distill_core.contracts.schedule",
    "Slot": "distill_core.contracts.slot",
    "default_component": "distill_core.contracts.slot",
    "DataSource": "distill_core.contracts.source",
    "Task": "distill_core.contracts.task",
    "TaskConfig": "distill_core.contracts.task",
    "Teacher": "distill_core.contracts.teacher",
    "TeacherConfig": "distill_core.contracts.teacher",
    "TeacherReader": "distill_core.contracts.teacher",
    "Visit": "distill_core.contracts.teacher",
    "Tracker": "distill_core.contracts.tracker",
    "TrackerConfig": "distill_core.contracts.tracker",
    "LoadReport": "distill_core.contracts.weights",
    "WeightLoader": "distill_core.contracts.weights",
    "Patience": "distill_core.data.shard",
    "Shard": "distill_core.data.shard",
    "ShardError": "distill_core.data.shard",
    "load_index": "distill_core.data.shard",
    "Shards": "distill_core.data.shard",
    "TarShard": "distill_core.data.tar_shards",
    "Unusable": "distill_core.data.shard",
    "tar_shards": "distill_core.data.tar_shards",
    "stable_hash": "distill_core.data.order",
    "AbsentModality": "distill_core.errors",
    "BadSample": "distill_core.errors",
    "counted": "distill_core.errors",
    "DataError": "distill_core.errors",
    "did_you_mean": "distill_core.errors",
    "StopRun": "distill_core.errors",
    "UserError": "distill_core.errors",
    "fingerprint": "distill_core.evaluate.cache",
    "stamps": "distill_core.evaluate.cache",
    "mean_over_sets": "distill_core.evaluate.score",
    "Score": "distill_core.evaluate.score",
    "encode_shared": "distill_core.evaluate.sets",
    "EvaluationSet": "distill_core.evaluate.sets",
    "Augmentation": "distill_core.interfaces",
    "Backbone": "distill_core.interfaces",
    "JointTower": "distill_core.interfaces",
    "JointTowerConfig": "distill_core.interfaces",
    "Raw": "distill_core.contracts.raw",
    "Collator": "distill_core.interfaces",
    "Decoder": "distill_core.interfaces",
    "FusionHead": "distill_core.interfaces",
    "Head": "distill_core.interfaces",
    "JointAugmentation": "distill_core.interfaces",
    "Loss": "distill_core.interfaces",
    "LossConfig": "distill_core.interfaces",
    "TowerInput": "distill_core.interfaces",
    "FeatureKind": "distill_core.model",
    "Model": "distill_core.model",
    "Losses": "distill_core.objective",
    "Objective": "distill_core.objective",
    "Encoded": "distill_core.outputs",
    "Features": "distill_core.outputs",
    "Fused": "distill_core.outputs",
    "Fusion": "distill_core.outputs",
    "Outputs": "distill_core.outputs",
    "Progress": "distill_core.outputs",
    "Rows": "distill_core.outputs",
    "wide": "distill_core.outputs",
    "BackboneSpec": "distill_core.plan",
    "DEFAULT_TEACHER": "distill_core.plan",
    "FieldPlan": "distill_core.plan",
    "MaskPlan": "distill_core.plan",
    "HeadPlan": "distill_core.plan",
    "MissingModality": "distill_core.plan",
    "ModalityPlan": "distill_core.plan",
    "Needs": "distill_core.plan",
    "Plan": "distill_core.plan",
    "TeacherPlan": "distill_core.plan",
    "Vocabulary": "distill_core.plan",
    "same_dim": "distill_core.plan",
    "Presence": "distill_core.presence",
    "Present": "distill_core.presence",
    "all_gather": "distill_core.system.distributed",
    "gather_objects": "distill_core.system.distributed",
    "raise_on_all_ranks": "distill_core.system.distributed",
    "rank": "distill_core.system.distributed",
    "world_size": "distill_core.system.distributed",
    "install": "distill_core.system.extras",
    "require_extra": "distill_core.system.extras",
    "cache_folder": "distill_core.system.files",
    "in_words": "distill_core.system.files",
    "make_room": "distill_core.system.files",
    "progress_bar": "distill_core.system.progress",
    "size_of": "distill_core.system.files",
    "write_whole": "distill_core.system.files",
    "read_folder": "distill_core.system.state_dicts",
    "read_json": "distill_core.system.state_dicts",
    "read_state_dict": "distill_core.system.state_dicts",
    "read_tensors": "distill_core.system.state_dicts",
    "StateDict": "distill_core.system.state_dicts",
    "unwrapped": "distill_core.system.state_dicts",
    "CopiedTeacher": "distill_core.teachers.copies",
    "CopyConfig": "distill_core.teachers.copies",
    "Callback": "distill_core.train",
    "Result": "distill_core.train",
}
"""Each public name -> the module that defines it."""


def load(run: str | Path, *, teacher: bool = False, checkpoint: str = "last", device: str = "cpu") -> Model:
    """The trained model of a run folder, ready to encode.

    `checkpoint` is `last`, `best`, or a step's number. Raises `distill_core.errors.UserError` with one line when the
    folder is not a run, has no such checkpoint, or trained no teacher.
    """
    from distill_core.run.load import load_model

    return load_model(run, teacher=teacher, checkpoint=checkpoint, device=device)


def fit(
    recipe: str | Path | Recipe,
    *,
    overrides: str | Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    runs: str | Path = "runs",
    quiet: bool = False,
) -> Result:
    """Train a recipe, evaluate it and report, as `distill run` does; the run's folder is `Result.folder`.

    `recipe` is a file, the name of a recipe that a plugin provides, YAML text (a str of several lines) or a `Recipe`;
    `overrides`, one or several, change it as `--set` does: ["train.steps=300", "fusion=mean_pooling"]. The folder is
    a new one in `runs`, and `distill resume` continues what was stopped.

    Each of the `callbacks` is called as callback(step, row) with every row that metrics.jsonl gets, on the first rank:
    each `train.log_every` steps one with `loss`, `terms`, `metrics`, `lr` and more, after a validation one with `split`
    and `scores`, for a step that is not finite one with `not_finite`. Training waits for it. One that raises `StopRun`
    ends the run as Ctrl-C does: after the step under way (on several ranks up to three later), saved, with
    `Result.signal` on every rank. Any other exception does so too, and then comes out of `fit`.

    A task that cannot be scored is in `Result.failed`, a last step that could not be saved in `Result.unsaved`; both
    are warned of. `quiet` prints nothing but warnings. Raises `UserError` with the text that `distill run` prints.
    """
    from pathlib import Path

    from distill_core.commands import training

    changes = [overrides] if isinstance(overrides, str) else overrides
    return training.fit(recipe, changes, Path(runs), callbacks, quiet=quiet)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'distill_core' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
