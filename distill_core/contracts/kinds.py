"""The kinds of components that the core defines, each with its interface. Plugins define further ones."""

from __future__ import annotations

from distill_core.contracts.balance import Balance
from distill_core.contracts.component import Component
from distill_core.contracts.hook import Hook
from distill_core.contracts.masker import Masker
from distill_core.contracts.optimizer import Optimizer
from distill_core.contracts.schedule import Schedule
from distill_core.contracts.source import DataSource
from distill_core.contracts.task import Task
from distill_core.contracts.teacher import Teacher
from distill_core.contracts.tracker import Tracker
from distill_core.contracts.weights import WeightLoader
from distill_core.interfaces import Augmentation, Backbone, FusionHead, Head, JointAugmentation, Loss

INTERFACES: dict[str, type[Component]] = {
    interface.kind: interface
    for interface in (
        Augmentation, JointAugmentation, Backbone, Masker, FusionHead, Head, Loss, Teacher, DataSource, Task, Optimizer,
        Schedule, Hook, Balance, Tracker, WeightLoader,
    )
}  # fmt: skip
