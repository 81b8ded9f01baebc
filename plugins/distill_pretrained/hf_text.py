"""A text encoder of Hugging Face transformers as a backbone, with the tokenizer of its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core import (
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    Plan,
    UserError,
    require_extra,
)
from distill_pretrained.folders import locate, read_config
from distill_vl.clip_text import RoleCollator

PAD = -1
"""Of ids: no tokenizer has it, whatever it pads with itself."""
FROM_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Model types whose first position is `pad_token_id + 1`, so that fewer tokens have one."""


class HfTextConfig(ComponentConfig):
    """A folder or a package, and how its tokens make an embedding."""

    folder: str | None = None
    """A folder with config.json, model.safetensors and a tokenizer, as `save_pretrained` writes them."""
    package: Literal["all_minilm_l6_v2"] | None = None
    """An installed package that brings such a folder, in place of `folder`."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """The mean over the text's tokens, its first token, or its last."""
    context: Annotated[int, Field(ge=3)] = 128
    """Longest sequence in tokens; longer texts are cut."""
    dim: Annotated[int, Field(gt=0)] = 512
    """Width D of the embedding."""

    @model_validator(mode="after")
    def _one(self) -> HfTextConfig:
        if (self.folder is None) == (self.package is None):
            raise ValueError("give either `folder` or `package`")
        return self


def _config(config: HfTextConfig) -> Any:
    """The library's config object of the folder, which has a width. Raises `UserError`."""
    hf: Any = require_extra("transformers", "hf")
    options, where = read_config(config.folder, config.package), f"hf_text: {config.folder or config.package}"
    kind = str(options.pop("model_type"))
    if kind not in hf.CONFIG_MAPPING:
        raise UserError(f"{where}: transformers has no model_type {kind!r}")
    try:
        config_of_model = hf.AutoConfig.for_model(kind, **options)
    except Exception as error:  # each of its configs checks values in its own way
        raise UserError(f"{where}: config.json is not one of a {kind}: {_first_line(error)}") from error
    if not isinstance(getattr(config_of_model, "hidden_size", None), int):
        raise UserError(f"{where}: a model of type {kind!r} has no hidden_size; take the folder of a text encoder")
    return config_of_model


def _load(hf: Any, folder: Path) -> Any:
    """The model of a folder, fp32. Raises `UserError`, also for weights that the file lacks."""
    logs = hf.utils.logging
    progress_bar, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()  # what is missing is told below, what is not used does not matter
    try:
        model, load_info = hf.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"hf_text: {folder}: cannot be loaded: {_first_line(error)}") from error
    finally:
        logs.set_verbosity(level)
        if progress_bar:
            logs.enable_progress_bar()
    missing = sorted(key for key in load_info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"hf_text: {folder}: the weights lack {len(missing)} tensors of a {type(model).__name__}, as {missing[0]}: "
            "take a folder whose weights are this model's"
        )
    return model


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class HfText(Backbone):
    """A pretrained text encoder: pooled = its pooled tokens, projected without bias; tokens = its last hidden states.

    Weights are read from safetensors, nothing is fetched, and no code of the folder is run. The model is
    `backbone.NAME.model`, for `freeze`; the projection `proj` is new.
    """

    name = "hf_text"
    Config = HfTextConfig
    examples = ({"package": "all_minilm_l6_v2", "dim": 24},)

    def __init__(self, config: HfTextConfig) -> None:
        super().__init__(config)
        hf: Any = require_extra("transformers", "hf")
        folder = locate(config.folder, config.package)
        # on `meta` only the names and shapes are asked for: no weights are read
        self.model: Any = hf.AutoModel.from_config(_config(config)) if torch.empty(0).is_meta else _load(hf, folder)
        if self.model.config.is_encoder_decoder:
            raise UserError(f"hf_text: {folder}: {self.model.config.model_type} has a decoder; take an encoder")
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its output is not read
        self.proj = nn.Linear(self.model.config.hidden_size, config.dim, bias=False)

    @classmethod
    def spec(cls, config: HfTextConfig) -> BackboneSpec:
        """Widths, from config.json. Raises `UserError` where there is none."""
        return BackboneSpec(_config(config).hidden_size, config.dim, class_tokens=1)

    @classmethod
    def problems(cls, config: HfTextConfig, plan: Plan) -> Iterable[str]:
        """A context that the model has no positions for."""
        try:
            model_config = _config(config)
        except UserError as error:
            return [str(error)]
        most = getattr(model_config, "max_position_embeddings", None)
        if isinstance(most, int) and model_config.model_type in FROM_PADDING:
            most -= (model_config.pad_token_id or 0) + 1
        if isinstance(most, int) and config.context > most:
            return [f"context {config.context} is more than the model's {most} positions"]
        return []

    @classmethod
    def collator(cls, config: HfTextConfig) -> Collator:
        """Tokenises; ids [V, B, L] by role, -1 after the end, cut to the longest text of the group."""
        return HfTextCollator(config.folder, config.package, config.context)

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """ids x [N, L], -1 after the end -> pooled [N, D], tokens [N, L, W] and mask, class tokens [N, 1, W]."""
        if token_mask is not None:
            raise ValueError("hf_text cannot hide tokens; use a text view whose words are masked")
        real = x != PAD
        if x.shape[0]:
            hidden: Tensor = self.model(input_ids=x.clamp(min=0), attention_mask=real.long()).last_hidden_state
        else:  # transformers' masks want a text
            hidden = self.proj.weight.new_zeros(*x.shape, self.proj.in_features)
        pooled = self._pool(hidden, real)
        encoded = Encoded(self.proj(pooled), class_tokens=pooled[:, None])
        if tokens:
            encoded.tokens, encoded.mask = hidden, real
        return encoded

    def _pool(self, hidden: Tensor, real: Tensor) -> Tensor:
        """[N, L, W], [N, L] -> [N, W]."""
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if self.config.pooling == "last":
            end = real.sum(1) - 1
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), end]
        weights = real[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)  # a tokenizer may give an empty text no token


class HfTextCollator(RoleCollator):
    """The views of B samples -> groups of ids [V, B, L] by role; the tokenizer is made in each worker."""

    def __init__(self, folder: str | None, package: str | None, context: int) -> None:
        self.folder, self.package, self.context = folder, package, context
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenizer": None}

    def ids(self, texts: list[str]) -> list[Tensor]:
        """Ids of each text, special tokens included, cut to the context. Raises `UserError`."""
        if self._tokenizer is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
            hf: Any = require_extra("transformers", "hf")
            folder = locate(self.folder, self.package)
            try:
                self._tokenizer = hf.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"hf_text: {folder}: no tokenizer can be loaded: {first}") from error
        rows = self._tokenizer(texts, truncation=True, max_length=self.context)["input_ids"]
        return [torch.tensor(ids, dtype=torch.long) for ids in rows]

    def padded(self, texts: list[str]) -> Tensor:
        """Ids [N, L] of N texts; padding is `PAD`. Raises `UserError`."""
        return nn.utils.rnn.pad_sequence(self.ids(texts), batch_first=True, padding_value=PAD)
