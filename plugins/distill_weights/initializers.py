"""Loading other libraries' weights: tower by tower, strictly, with a report of what the source lacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_core import (
    Backbone,
    ComponentConfig,
    LoadReport,
    Objective,
    StateDict,
    UserError,
    WeightLoader,
    read_folder,
    read_json,
    read_state_dict,
    unwrapped,
)
from distill_vl.clip_text import ClipText
from distill_vl.contrastive import ContrastiveLoss
from distill_vl.pictures import other_pixels
from distill_vl.vit import VisionTransformer, position_map
from distill_weights.layouts import Pixels, Source, from_hf, from_hf_siglip, from_open_clip, from_timm, pixels

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HF_FILES = ("model.safetensors", "pytorch_model.bin")
"""Of timm too."""
OURS: dict[str, type[Backbone]] = {"image": VisionTransformer, "text": ClipText}
NEW = ("more_class_embeddings", "mask_token")
"""Parameters of our towers that no source has."""


class TowersConfig(ComponentConfig):
    """Where weights come from, and which towers they go to."""

    source: str
    """The file or folder."""
    image: str | None = "image"
    """The modality whose backbone (`vit`) takes the picture tower; null leaves that tower out."""
    text: str | None = "text"
    """The modality whose backbone (`clip_text`) takes the text tower; null leaves that tower out."""


class Towers(WeightLoader):
    """Base: reads a `Source` and puts its towers into the student; the teacher starts from the student."""

    config: Any

    @abstractmethod
    def read(self) -> Source:
        """The source's towers. Raises `UserError`."""

    @torch.no_grad()
    def apply(self, objective: Objective) -> LoadReport:
        """Raises `UserError` with everything that does not fit, and then loads nothing."""
        try:
            source = self.read()
        except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"weights: {self.config.source}: its config or tensors are not what {self.name!r} reads "
                f"({type(error).__name__}: {error})"
            ) from error
        parameters = dict(objective.named_parameters())
        loaded: dict[str, Tensor] = {}
        problems: list[str] = []
        notes = list(source.notes)
        for tower in ("image", "text"):
            name = getattr(self.config, tower, None)
            if name is None:
                continue
            module = dict(objective.backbone.items()).get(name)
            if type(module) is not OURS[tower]:
                description = "not there" if module is None else f"`{module.name}`"
                problems.append(
                    f"backbone.{name} is {description}; the {tower} tower goes into `{OURS[tower].name}` "
                    f"(`{tower}: null` in this entry leaves it out)"
                )
                continue
            tensors, tower_problems, remarks = fit(module, source, tower, f"backbone.{name}")
            loaded |= {f"backbone.{name}.{key}": value for key, value in tensors.items()}
            problems += tower_problems
            notes += remarks
            if tower == "image" and source.pixels is not None:
                notes += other_pixels(objective.plan, name, *source.pixels, "the source was trained with")
        if problems:
            raise UserError(f"weights: {source.what} does not fit:\n  " + "\n  ".join(problems))
        if not loaded:
            raise UserError(f"weights: {source.what}: every tower is excluded, so there is nothing to load")
        scales = _scales(objective, source)
        loaded |= {name: value for name, (value, _) in scales.items()}
        if unused := [name for name in source.scale if name not in {source_name for _, source_name in scales.values()}]:
            notes.append(f"left out, as no loss over the towers' own embeddings has one: {', '.join(unused)}")
        for name, value in loaded.items():
            parameters[name].copy_(value)
        fresh = parts(name for name in parameters if name not in loaded and not name.startswith("teacher."))
        if fresh:
            notes.append(f"not in the source, so initialised anew: {', '.join(fresh)}")
        return LoadReport("; ".join([f"{source.what}: {len(loaded)} tensors", *notes]), frozenset(loaded))


def fit(module: nn.Module, source: Source, tower: str, path: str) -> tuple[StateDict, list[str], list[str]]:
    """(tensors for the module, problems, remarks) for one tower of the source."""
    config: Any = module.config
    state, parameters = dict(source.towers[tower]), dict(module.named_parameters())
    notes: list[str] = []
    problems = [
        f"{path}.{option} is {getattr(config, option)}, the source was trained with {value}: set {option}: {value}"
        for option, value in source.options[tower].items()
        if hasattr(config, option) and getattr(config, option) != value
    ]
    undeclared = [option for option in ("heads", "activation") if option not in source.options[tower]]
    if tower == "text" and source.options[tower].get("norm_eps", 1e-5) != 1e-5:
        problems.append(f"{path}: the source's LayerNorms add {source.options[tower]['norm_eps']}, `clip_text`'s 1e-05")
    if undeclared and state:
        notes.append(f"it does not say {' and '.join(undeclared)} of {tower}: as the recipe has them")
    if "positional_embedding" in state:
        try:
            state["positional_embedding"], line = _positions(state["positional_embedding"], config, tower)
            notes += line
        except ValueError as error:
            problems.append(f"{path}.{error}")
            del state["positional_embedding"], parameters["positional_embedding"]
    optional = (*NEW, "proj", "text_projection")
    if "proj" in state and getattr(config, "pooling", None) == "attention" and config.dim != config.width:
        del state["proj"]
        notes.append(f"its embedding is what it pools, {config.width} wide: the projection to {config.dim} is new")
    problems += _some(
        [f"{path}.{key}: missing in it" for key in parameters if key not in state and key not in optional]
    )
    problems += _some([f"{key}: not in {path}" for key in state if key not in parameters])
    problems += _some(
        [
            f"{path}.{key}: shape {list(value.shape)}, this model has {list(parameters[key].shape)}"
            for key, value in state.items()
            if key in parameters and value.shape != parameters[key].shape
        ]
    )
    return state, problems, notes


def _some(lines: list[str], most: int = 4) -> list[str]:
    """The first few lines, so that each kind of problem is shown."""
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more like it"]


def _positions(table: Tensor, config: Any, tower: str) -> tuple[Tensor, list[str]]:
    """Position embeddings of this tower's size, and remarks. Raises ValueError if the table cannot be converted."""
    if table.ndim != 2:
        raise ValueError(f"positional_embedding: shape {list(table.shape)}, not [positions, width]")
    count = len(table)
    if tower == "text":
        if count < config.context:
            raise ValueError(f"context is {config.context}, the source has {count} positions")
        return table[: config.context], [
            f"{config.context} of {count} text positions"
        ] if count > config.context else []
    first = int(config.pooling == "class_token")
    old, new = round((count - first) ** 0.5), config.image_size // config.patch
    if old < 1 or old * old + first != count:
        square = "no square and a class token" if first else "no square"
        raise ValueError(f"positional_embedding: the source's {count} positions are {square}")
    if old == new:
        return table, []
    resized = (position_map(old, new, new) @ table[first:].double()).to(table.dtype)
    return torch.cat([table[:first], resized]), [f"image positions resized from {old} x {old} to {new} x {new}"]


def _scales(objective: Objective, source: Source) -> dict[str, tuple[Tensor, str]]:
    """Our name -> (value, the source's name) of the learned scale (and bias), if the source has one.

    They go to the first contrastive loss over the towers' own embeddings, which needs no fused views.
    """
    for id, loss in objective.loss.items():
        if isinstance(loss, ContrastiveLoss) and not loss.needs(loss.config, objective.plan).fused:
            parameters = dict(loss.named_parameters())
            matches = {k: v for k, v in source.scale.items() if k in parameters and v.numel() == 1}
            return {f"loss.{id}.{k}": (v.reshape(()), k) for k, v in matches.items()}
    return {}


def parts(names: Any) -> list[str]:
    """Parameters by the part of the recipe they belong to, in order: `fusion.PART`, `fusions.NAME.PART`, `heads.NAME`,
    `loss.ID`, `balance`, `backbone.NAME.PART`."""
    depth = {"fusion": 2, "fusions": 3, "heads": 2, "loss": 2, "balance": 1, "backbone": 3}
    return list(dict.fromkeys(".".join(name.split(".")[: depth[name.split(".")[0]]]) for name in names))


class OpenClipConfig(TowersConfig):
    """As `hf_clip`'s, and a state dict among several."""

    key: str | None = None
    """The state dict that is taken where a torch file holds several."""


class OpenClip(Towers):
    """Start from CLIP weights of open_clip or OpenAI: a file of a state dict, or a folder with `open_clip_config.json`.

    The learned scale goes to the first contrastive loss over unfused embeddings. Both towers must have the recipe's
    shapes; position embeddings of another picture size are resized, further text positions cut.
    """

    name = "open_clip"
    Config = OpenClipConfig
    examples = ({"source": "no-such-file.pt"},)

    def read(self) -> Source:
        """A file's tensors; a folder's config as well."""
        path = Path(self.config.source)
        config: dict[str, Any] = {}
        if path.is_dir():
            if not (path / "open_clip_config.json").exists() and (path / "config.json").exists():
                raise UserError(
                    f"weights: {path}: holds no open_clip_config.json, but a config.json: name hf_clip instead"
                )
            config = read_json(path / "open_clip_config.json")
            if not isinstance(config.get("model_cfg"), dict):
                raise UserError(f"weights: {path}/open_clip_config.json: has no `model_cfg`")
        state, notes = (
            read_folder(path, OPEN_CLIP_FILES, self.config.key) if config else read_state_dict(path, self.config.key)
        )
        source = from_open_clip(unwrapped(state), config.get("model_cfg"), str(path))
        source.notes, source.pixels = notes, pixels(config.get("preprocess_cfg"), "mean", "std")
        return source


class HfClip(Towers):
    """Start from a folder that `save_pretrained` of a Hugging Face `CLIPModel` wrote: config.json, model.safetensors.

    As `open_clip` otherwise.
    """

    name = "hf_clip"
    Config = TowersConfig
    examples = ({"source": "no-such-folder"},)

    def read(self) -> Source:
        """The folder's tensors and config."""
        return _read_hf(Path(self.config.source), from_hf)


class HfSiglipConfig(ComponentConfig):
    """A SigLIP's folder, and the tower that takes its image tower."""

    source: str
    """The folder."""
    image: str = "image"
    """The modality whose backbone (`vit`) takes it."""


class HfSiglip(Towers):
    """Start the picture tower from a folder that `save_pretrained` of a Hugging Face `SiglipModel` wrote (SigLIP, and
    SigLIP 2 of one image size). `vit` wants `pooling: attention`, `activation: gelu_tanh`, `pre_norm: false` and
    `norm_eps: 1e-6`; with `dim` as its width the embedding is SigLIP's, else the projection to it is new.

    The text tower, which is not causal and has its own tokenizer, is left.
    """

    name = "hf_siglip"
    Config = HfSiglipConfig
    examples = ({"source": "no-such-folder"},)

    def read(self) -> Source:
        """The folder's tensors and config."""
        return _read_hf(Path(self.config.source), from_hf_siglip)


def _read_hf(path: Path, convert: Callable[[Any, Any, str], Source]) -> Source:
    """Raises `UserError`."""
    if not path.is_dir():
        raise UserError(f"weights: {path}: no such folder")
    state, notes = read_folder(path, HF_FILES)
    source = convert(unwrapped(state), read_json(path / "config.json"), str(path))
    source.notes, source.pixels = notes, _hf_pixels(path)
    return source


def _hf_pixels(path: Path) -> Pixels | None:
    """Of the image processor, which newer folders keep within the processor's own config."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (path / file).is_file():
            config = read_json(path / file)
            return pixels(config.get("image_processor", config), "image_mean", "image_std")
    return None


class TimmVitConfig(ComponentConfig):
    """A Vision Transformer's weights, and the tower that takes them."""

    source: str
    """A `.safetensors` or torch file of a state dict, or a folder that timm wrote (config.json, model.safetensors)."""
    image: str = "image"
    """The modality whose backbone (`vit`) takes them."""
    key: str | None = None
    """The state dict that is taken where the file holds several, as `teacher` of DINO's full checkpoints."""


class TimmVit(Towers):
    """Start the picture tower from a ViT of timm, DINO or DINOv2; the projection to the embedding is new. Those with
    attention pooling (SigLIP's, of open_clip too) go into a `vit` with `pooling: attention`.

    LayerScale is folded into the weights. Those ViTs have no LayerNorm in front: `vit` wants `pre_norm: false` and
    `norm_eps: 1e-6`.
    """

    name = "timm_vit"
    Config = TimmVitConfig
    examples = ({"source": "no-such-file.pt"},)

    def read(self) -> Source:
        """A file's tensors; of a folder also its pixels' mean and std."""
        path, key = Path(self.config.source), self.config.key
        state, notes = read_folder(path, HF_FILES, key) if path.is_dir() else read_state_dict(path, key)
        source = from_timm(unwrapped(state), str(path))
        source.notes = notes + source.notes
        if path.is_dir():
            config = read_json(path / "config.json")
            source.pixels = pixels(config.get("pretrained_cfg", config), "mean", "std")
        return source
