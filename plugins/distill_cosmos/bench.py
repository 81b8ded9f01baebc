"""`distill bench step RECIPE`: the framework's COSMOS step against that of cosmos.py, part by part."""

from __future__ import annotations

import copy
import csv
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill_core import Batch, Group, Objective, Progress, UserError, Views
from distill_core.tools import Recipe, build_objective, compile_units, keep_freed_memory
from distill_cosmos import cosmos, official
from distill_cosmos.fusion import CrossAttention
from distill_cosmos.losses import CrossModalDistillation
from distill_vl.contrastive import Contrastive

CPU = torch.device("cpu")
ROLES = ("global", "local")


class Clock:
    """Seconds by part; `mark(part)` gives it what passed since the last mark.

    On a CPU those of this process (user and system); on a GPU wall time, each part waited for.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._last = 0.0

    def now(self) -> float:
        """Seconds, from no particular moment."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self._last = self.now()

    def mark(self, part: str) -> None:
        """A part has ended."""
        end = self.now()
        self.parts[part].append(end - self._last)
        self._last = end


def make_batch(recipe: Recipe, size: int, global_tokens: int, local_tokens: int) -> Batch:
    """Random crops, and captions whose lengths vary by a third around the given means."""
    generator = torch.Generator().manual_seed(0)
    image, text = recipe.augment["image"].config, recipe.backbone["text"].config
    roles = {name: modality.roles for name, modality in recipe.plan.modalities.items()}

    def crops(role: str, side: int) -> list[Group]:
        number = roles["image"].count(role)
        return [Group(torch.randn(number, size, 3, side, side, generator=generator), role)] if number else []

    def captions(role: str, mean: int) -> list[Group]:
        number = roles["text"].count(role)
        ids = torch.zeros(number, size, text.context, dtype=torch.long)
        for row in ids.view(-1, text.context):
            spread = max(1, mean // 3)
            length = mean + int(torch.randint(-spread, spread + 1, (1,), generator=generator))
            length = min(max(length, 3), text.context)
            row[: length - 1] = torch.randint(1, text.vocabulary - 2, (length - 1,), generator=generator)
            row[length - 1] = text.vocabulary - 1
        longest = int(ids.argmax(-1).max()) + 1 if number else 0
        return [Group(ids[..., :longest], role)] if number else []

    views = {
        "image": Views(crops("global", image.size) + crops("local", image.local_size)),
        "text": Views(captions("global", global_tokens) + captions("local", local_tokens)),
    }
    return Batch(views, [str(i) for i in range(size)])


class Ours:
    """The framework's step."""

    def __init__(self, recipe: Recipe, objective: Objective, batch: Batch, clock: Clock) -> None:
        self.objective, self.batch, self.clock = objective, batch, clock
        maker = recipe.train.optimizer.build()
        self.optimizer = maker.build(maker.groups(objective.trainable([], {})))

    def losses(self) -> dict[str, Tensor]:
        """Forward pass."""
        objective, clock, progress = self.objective, self.clock, Progress(0, 1000)
        teacher = objective.represent_teachers(self.batch)
        clock.mark("teacher")
        student = {}
        for name, part in (("image", "image tower"), ("text", "text tower")):
            student[name] = objective.represent_student(self.batch, name)
            clock.mark(part)
        self.outputs = objective.fuse(self.batch, student, teacher, progress)
        clock.mark("fusion")
        result = objective.losses(self.outputs)
        clock.mark("losses")
        return result.terms

    def update(self) -> None:
        """Teacher and optimiser."""
        progress = Progress(0, 1000)
        self.objective.before_optimizer(progress)
        self.optimizer.step()
        self.objective.after_step(self.outputs, progress)
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """By public name."""
        own = dict(self.objective.named_parameters())
        names = official.public_names(self.objective)
        return {key: grad.clone() for key, name in names.items() if (grad := own[name].grad) is not None}


class Plain:
    """The step of cosmos.py, which is written from the equations."""

    def __init__(self, recipe: Recipe, objective: Objective, batch: Batch, clock: Clock) -> None:
        vit, text = recipe.backbone["image"].config, recipe.backbone["text"].config
        fusion: Any = recipe.fusion
        self.student, self.teacher = (cosmos.Cosmos(vit, text, fusion.config.heads).to(clock.device) for _ in range(2))
        states = official.public_state_dict(objective)
        self.student.load_state_dict(states["student"])
        self.teacher.load_state_dict(states["teacher"], strict=False)
        # the teacher runs under no_grad; with requires_grad off as well, torch sends products of its padded, transposed
        # sequences through bmm with a copied weight (16 times slower in bf16), which would flatter ours
        self.clock = clock
        ema = recipe.teacher.config if recipe.teacher is not None else None
        self.momentum = ema.momentum.value(Progress(0, 1)) if ema is not None else 0.0
        self.images = cosmos.Views(*(_views(batch, "image", role) for role in ROLES))
        captions = ([pad(x, (0, text.context - x.shape[1])) for x in _views(batch, "text", role)] for role in ROLES)
        self.texts = cosmos.Views(*captions)
        # the text tokens that a fusion reads: to the context, or to the longest global text
        longest = batch.views["text"].groups[0].x.shape[-1]
        self.text_length = text.context if text.padding == "context" else longest
        self.mask_padding = bool(fusion.config.mask_padding)
        self.globals = [recipe.plan.modalities[name].roles.count("global") for name in ("image", "text")]
        options = recipe.train.optimizer.config
        decay = options.weight_decay.value(Progress(0, 1))
        decayed = [p for p in self.student.parameters() if p.ndim >= 2]
        others = [p for p in self.student.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
        )

    def losses(self) -> dict[str, Tensor]:
        """Forward pass."""
        return cosmos.losses(
            self.student,
            self.teacher,
            self.images,
            self.texts,
            text_length=self.text_length,
            mask_padding=self.mask_padding,
            mark=self.clock.mark,
        )

    def update(self) -> None:
        """Teacher and optimiser."""
        cosmos.update(self.student, self.teacher, self.optimizer, self.momentum)

    def gradients(self) -> dict[str, Tensor]:
        """By public name."""
        return {key: p.grad.clone() for key, p in self.student.named_parameters() if p.grad is not None}


def _views(batch: Batch, modality: str, role: str) -> list[Tensor]:
    return [x for group in batch.views[modality].groups if group.role == role for x in group.x]


def _step(side: Ours | Plain, precision: str) -> dict[str, Tensor]:
    side.clock.start()
    with torch.autocast(side.clock.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        terms = side.losses()
    total = torch.stack(list(terms.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    side.clock.mark("backward")
    return terms


def agreement(ours: Ours, other: Ours | Plain) -> tuple[float, float]:
    """Largest relative difference in fp32 of a loss, and of a parameter's gradient (key biases,
    whose gradients are noise, apart).

    Raises `UserError` when the two steps are not the same step.
    """
    step_of_ours, step_of_other = _step(ours, "fp32"), _step(other, "fp32")
    gradients, expected = ours.gradients(), other.gradients()
    apart = sorted((step_of_ours.keys() ^ step_of_other.keys()) | (gradients.keys() ^ expected.keys()))
    if apart:
        raise UserError(f"the two steps differ: only one of them has a loss or a gradient of {', '.join(apart)}")
    losses = [abs(step_of_ours[name].item() / value.item() - 1) for name, value in step_of_other.items()]
    errors = []
    for key, reference in expected.items():
        value = gradients[key]
        if key.endswith("in_proj_bias"):
            third = len(reference) // 3
            keep = torch.ones(len(reference), dtype=torch.bool, device=reference.device)
            keep[third : 2 * third] = False
            value, reference = value[keep], reference[keep]
        errors.append(((value - reference).norm() / reference.norm()).item())
    ours.optimizer.zero_grad()
    other.optimizer.zero_grad()
    loss, gradient = max(losses), max(errors)
    if not all(error <= 1e-5 for error in losses + errors):  # NaN is no agreement
        raise UserError(f"the two steps differ: losses by {loss:.1e}, gradients by {gradient:.1e}")
    return loss, gradient


def check(recipe: Recipe) -> None:
    """Raises `UserError` for a recipe that is not COSMOS with the built-in towers."""
    classes = {CrossAttention, Contrastive, CrossModalDistillation}
    have = {slot.cls for slot, _ in recipe.needs()}
    towers = {name: node.cls.name for name, node in recipe.backbone.items()}
    if have != classes or towers != {"image": "vit", "text": "clip_text"} or recipe.teacher is None:
        raise UserError("distill bench step: the straightforward step is COSMOS with vit and clip_text, and a teacher")


def bench_step(
    recipe: Recipe,
    *,
    batch_size: int,
    global_tokens: int,
    local_tokens: int,
    rounds: int,
    say: Callable[[str], None],
    precisions: Sequence[str] = ("fp32", "bf16"),
    device: torch.device = CPU,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Rows by precision and part: median seconds of both (`Clock`), and their ratio. One thread, interleaved.

    With `compiled` ours, compiled, is compared with ours, eager: not with that of cosmos.py.

    Raises `UserError` for another recipe than `check` takes, for two steps that differ, and for a batch of one sample.
    """
    check(recipe)
    if batch_size < 2:
        raise UserError(
            "distill bench step: one sample has no negatives, so losses and gradients are 0: --batch 2 or more"
        )
    torch.set_num_threads(1)
    if device.type == "cpu":  # as training does, for both
        keep_freed_memory()
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    objective = build_objective(recipe).to(device)
    batch = make_batch(recipe, batch_size, global_tokens, local_tokens).to(device)
    ours = Ours(recipe, objective, batch, Clock(device))
    other: Ours | Plain
    if compiled:
        names = ("compiled", "eager")
        other = Ours(recipe, copy.deepcopy(objective), batch, Clock(device))
        compile_units(objective)
    else:
        names = ("ours", "plain")
        other = Plain(recipe, objective, batch, Clock(device))
    loss, gradient = agreement(ours, other)
    say(f"same step: losses agree to {loss:.1e}, gradients to {gradient:.1e} (relative, fp32)")
    for precision in precisions:
        totals: dict[str, list[float]] = {name: [] for name in names}
        pairs = list(zip(names, (ours, other), strict=True))
        ours.clock.parts.clear()
        other.clock.parts.clear()
        for i in range(rounds + 1):
            for name, side in pairs if i % 2 else reversed(pairs):
                began = side.clock.now()
                _step(side, precision)
                side.update()
                side.clock.mark("update")
                if i == 0:
                    side.clock.parts.clear()
                else:
                    totals[name].append(side.clock.now() - began)
        for part in [*ours.clock.parts, "step"]:
            a = statistics.median(totals[names[0]] if part == "step" else ours.clock.parts[part])
            b = statistics.median(totals[names[1]] if part == "step" else other.clock.parts[part])
            ratios = [y / x for x, y in zip(*totals.values(), strict=True)]
            row = {
                "precision": precision,
                "part": part,
                f"{names[1]}_s": round(b, 4),
                f"{names[0]}_s": round(a, 4),
                "ratio": round(b / a, 3),
            }
            if part == "step":
                row["ratio"] = round(statistics.median(ratios), 3)
            rows.append(row)
            say(f"{precision}  {part:12}  {names[1]} {b:7.3f} s   {names[0]} {a:7.3f} s   {row['ratio']:.2f} x")
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]], recipe: str, batch_size: int, device: torch.device = CPU) -> None:
    """The rows, with recipe, batch, device and torch, in place of this device's rows of the file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    about = {"recipe": recipe, "batch": batch_size, "device": name, "torch": torch.__version__.split("+")[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_of_others = []
    if path.exists():
        with path.open(newline="") as file:
            rows_of_others = [row for row in csv.DictReader(file) if row["device"] != name]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows_of_others, *(row | about for row in rows)])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
