"""The three formats: each writes a folder, and opens it again with the other library to embed the same samples."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from distill_core import Decoder, Encoded, FeatureKind, UserError, require_extra
from distill_weights.layouts import HF_ACTIVATIONS, open_clip_config, to_hf
from distill_weights.subject import Subject, unit

MOST_INSIDE = 1_500_000_000
"""Largest weights in bytes that are stored inside an ONNX file; protobuf is limited to 2 GB."""

Decode = Callable[[Mapping[str, Sequence[Any]]], Tensor]
"""N items of each modality -> the other library's logits [N, L, S], for all ids of those that are written."""


class Format(ABC):
    """An export for another library, and that library's use of it."""

    def __init__(self, subject: Subject) -> None:
        """Raises `UserError` where a package is missing or the run cannot be expressed."""
        self.subject = subject
        self.notes: list[str] = []

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """The modalities that are exported."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write weights and configs into the folder."""

    @abstractmethod
    def open(self, folder: Path) -> None:
        """Load the export with the other library."""

    @abstractmethod
    def embed(self, modality: str, x: Tensor) -> Tensor:
        """The other library's embeddings [N, D] of our backbone's inputs, L2-normalised."""

    def inputs(self, modality: str, items: list[Any]) -> Tensor | None:
        """The other library's preprocessing of raw items; None if it has none."""
        return None

    def features(self, modality: str) -> FeatureKind:
        """The kind of features that are exported; most layouts hold only embeddings."""
        return "embedding"

    def decoders(self) -> dict[str, Decode]:
        """The decoders that are exported, by the head's name; most layouts hold none."""
        return {}

    def untrained(self) -> list[str]:
        """A line for each modality whose embedding no loss trained."""
        return [
            f"{name}: no loss of the run trains its embedding, so "
            + (
                "its class tokens are exported"
                if self.features(name) == "class_token"
                else "the exported projection has its initial weights"
            )
            for name in self.modalities
            if name in self.subject.model.untrained
        ]


class OpenClipFormat(Format):
    """`open_clip_config.json` and `open_clip_model.safetensors`, for `local-dir:FOLDER`."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.library = require_extra("open_clip", "open-clip")
        self.clip = subject.clip("open_clip")

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.clip.image, self.clip.text

    def write(self, folder: Path) -> None:
        """One state dict: the picture's tower below `visual.`."""
        from safetensors.torch import save_file

        clip, scales = self.clip, self.subject.scales
        options = clip.pictures
        config = open_clip_config(
            clip.vit.config,
            clip.text_tower.config,
            size=options.size,
            mean=options.mean,
            std=options.std,
            bias="logit_bias" in scales,
        )
        towers = clip.towers()
        state = {f"visual.{name}": value for name, value in towers["image"].items()} | towers["text"] | scales
        if "logit_scale" not in scales:
            state["logit_scale"] = torch.tensor(1 / 0.07).log()
            self.notes.append(
                "no loss over the towers' own embeddings learned a scale: logit_scale is CLIP's first, log(1 / 0.07)"
            )
        save_file(
            {name: value.float().contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors"
        )
        write_json(folder / "open_clip_config.json", config)

    def open(self, folder: Path) -> None:
        """As a user would."""
        name = f"local-dir:{folder}"
        with quiet():
            self.model, _, self.preprocess = self.library.create_model_and_transforms(name)
            self.tokenizer = self.library.get_tokenizer(name)
        self.model.eval()

    @torch.no_grad()
    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Texts are padded to the context."""
        if modality == self.clip.image:
            return unit(self.model.encode_image(x))
        return unit(self.model.encode_text(pad(x, (0, self.clip.text_tower.config.context - x.shape[1]))))

    def inputs(self, modality: str, items: list[Any]) -> Tensor | None:
        """Its transform, its tokenizer."""
        if modality == self.clip.image:
            return torch.stack([self.preprocess(item) for item in items])
        ids: Tensor = self.tokenizer(items)
        return ids


class HfFormat(Format):
    """A `CLIPModel` and a `CLIPProcessor`, as `save_pretrained` writes them."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.library = require_extra("transformers", "hf")
        self.bpe = require_extra("open_clip.tokenizer", "hf")
        self.clip = subject.clip("hf")
        if not self.clip.vit.config.pre_norm:
            raise UserError(
                f"--to hf: backbone.{self.clip.image}.pre_norm is false; CLIPModel has a LayerNorm there. Try --to onnx"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.clip.image, self.clip.text

    def write(self, folder: Path) -> None:
        """Model, image processor and tokenizer."""
        hf, clip = self.library, self.clip
        image, text, scales = clip.vit.config, clip.text_tower.config, self.subject.scales
        common = {"projection_dim": image.dim}
        config = hf.CLIPConfig(
            vision_config=common
            | {
                "hidden_size": image.width,
                "intermediate_size": int(image.width * image.mlp_ratio),
                "num_hidden_layers": image.layers,
                "num_attention_heads": image.heads,
                "image_size": clip.pictures.size,
                "patch_size": image.patch,
                "hidden_act": HF_ACTIVATIONS.get(image.activation, image.activation),
                "layer_norm_eps": image.norm_eps,
            },
            text_config=common
            | {
                "vocab_size": text.vocabulary,
                "hidden_size": text.width,
                "intermediate_size": int(text.width * text.mlp_ratio),
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "max_position_embeddings": text.context,
                "hidden_act": HF_ACTIVATIONS.get(text.activation, text.activation),
                "layer_norm_eps": 1e-5,
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                "pad_token_id": 49407,
            },
            **common,
        )
        with quiet():
            model = hf.CLIPModel(config)
            state = to_hf(clip.towers())
            state["logit_scale"] = scales.get("logit_scale", torch.tensor(1 / 0.07).log())
            if "logit_bias" in scales:
                self.notes.append("CLIPModel has no bias: the run's logit_bias is left out")
            model.load_state_dict(state)
            model.save_pretrained(folder)
            self._processor().save_pretrained(folder)

    def _processor(self) -> Any:
        hf, options = self.library, self.clip.pictures
        tokens = self.bpe.SimpleTokenizer()  # CLIP's merges, which open_clip brings
        vocabulary = dict(tokens.encoder)
        vocabulary["<|startoftext|>"] = vocabulary.pop(next(k for k, v in tokens.encoder.items() if v == 49406))
        vocabulary["<|endoftext|>"] = vocabulary.pop(next(k for k, v in tokens.encoder.items() if v == 49407))
        merges = [pair for pair, _ in sorted(tokens.bpe_ranks.items(), key=lambda item: item[1])]
        tokenizer = hf.CLIPTokenizer(
            vocab=vocabulary, merges=merges, model_max_length=self.clip.text_tower.config.context
        )
        pixels = hf.CLIPImageProcessor(
            size={"shortest_edge": options.size},
            crop_size={"height": options.size, "width": options.size},
            image_mean=list(options.mean),
            image_std=list(options.std),
        )
        return hf.CLIPProcessor(pixels, tokenizer)

    def open(self, folder: Path) -> None:
        """As a user would."""
        with quiet():
            self.model = self.library.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.processor = self.library.CLIPProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Its features, which transformers 5 wraps."""
        if modality == self.clip.image:
            features = self.model.get_image_features(pixel_values=x)
        else:
            features = self.model.get_text_features(input_ids=x)
        return unit(features if isinstance(features, Tensor) else features.pooler_output)

    def inputs(self, modality: str, items: list[Any]) -> Tensor | None:
        """Its processor."""
        if modality == self.clip.image:
            inputs = self.processor.image_processor(images=items, return_tensors="pt")["pixel_values"]
        else:
            inputs = self.processor.tokenizer(items, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        assert isinstance(inputs, Tensor)
        return inputs


class Tower(nn.Module):
    """A backbone's plain path: input [N, ...] -> embedding [N, D], or class token [N, W], L2-normalised; with `tokens`
    also what decoders read, [N, P, W], and its mask [N, P] where there is one."""

    def __init__(self, backbone: nn.Module, features: FeatureKind, tokens: bool = False) -> None:
        super().__init__()
        self.backbone, self.features, self.tokens = backbone, features, tokens

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One group of inputs, nothing packed."""
        encoded: Encoded = self.backbone.encode(x, tokens=self.tokens, token_mask=None)  # type: ignore[operator]
        if self.features == "embedding":
            embedding = encoded.pooled
        else:
            assert encoded.class_tokens is not None  # or these features would not be the default
            embedding = encoded.class_tokens[:, 0]
        read = (encoded.tokens, encoded.mask) if self.tokens else ()
        return (normalize(embedding, dim=-1), *(part for part in read if part is not None))


class Writer(nn.Module):
    """A decoder as a function of tensors: ids [N, L], then the tokens [N, P, W] of each modality that it reads, each
    with its mask [N, P] where it has one -> logits [N, L, S]."""

    def __init__(self, decoder: Decoder, reads: Sequence[tuple[str, bool]]) -> None:
        """`reads`: modalities, and whether each has a mask."""
        super().__init__()
        self.decoder, self.reads = decoder, tuple(reads)

    def forward(self, ids: Tensor, *read: Tensor) -> Tensor:
        """In the order of `reads`."""
        parts = iter(read)
        encoded = {}
        for name, has_mask in self.reads:
            tokens = next(parts)
            encoded[name] = Encoded(tokens[:, 0], tokens, next(parts) if has_mask else None)
        return self.decoder(encoded, ids)  # type: ignore[no-any-return]


class OnnxFormat(Format):
    """A file `MODALITY.onnx` for each tower and `heads.NAME.onnx` for each decoder, of any whose plain path can be
    traced; batch and text length are dynamic. Towers also give the tokens that a decoder reads."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.library = require_extra("onnxruntime", "onnx")
        require_extra("onnxscript", "onnx")
        self.writers = subject.decoders()
        for name in self.writers:
            del subject.left_out[f"heads.{name}"]
        self.read = {name for decoder in self.writers.values() for name in decoder.reads(decoder.config)}

    @property
    def modalities(self) -> tuple[str, ...]:
        """All of the run."""
        return self.subject.model.modalities

    def features(self, modality: str) -> FeatureKind:
        """What the run itself takes for an item's embedding."""
        return self.subject.model.default_features(modality)

    def write(self, folder: Path) -> None:
        """Raises `UserError` for a tower or a decoder that cannot be traced."""
        about: dict[str, Any] = {}
        for name in self.modalities:
            backbone = self.subject.model.backbone[name]
            x = self.subject.inputs(name, self.subject.items(name))
            sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
            if not x.is_floating_point():
                sizes[1] = torch.export.Dim("length")
            read = self._tensors(name) if name in self.read else {}
            tower = Tower(backbone, self.features(name), bool(read)).eval()
            outputs = [f"{name}_embedding", *read]
            what = f"backbone.{name} ({backbone.name!r})"
            self._trace(tower, {name: x}, (sizes,), outputs, folder / f"{name}.onnx", what)
            about[name] = {"file": f"{name}.onnx", "input": name, "output": outputs[0]} | self._about(name, x)
            if read:
                about[name]["read_by_decoders"] = outputs[1:]
        for name, decoder in self.writers.items():
            about[f"heads.{name}"] = self._write_decoder(folder, name, decoder)
        write_json(folder / "preprocess.json", about | {n: float(v) for n, v in self.subject.scales.items()})

    def _tensors(self, modality: str) -> dict[str, Tensor]:
        """What a decoder reads of the modality's items, by the names of inputs and outputs."""
        encoded = self.subject.read(modality, self.subject.items(modality))
        named = {f"{modality}_tokens": encoded.tokens, f"{modality}_mask": encoded.mask}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}  # strides are traced

    def _write_decoder(self, folder: Path, name: str, decoder: Decoder) -> dict[str, Any]:
        writes, reads = decoder.writes(decoder.config), decoder.reads(decoder.config)
        tower = self.subject.model.backbone[writes]
        vocabulary = tower.spec(tower.config).vocabulary
        assert vocabulary is not None  # or it could not be written
        ids = self.subject.inputs(writes, self.subject.items(writes))
        read = {modality: self._tensors(modality) for modality in reads}
        tensors = {key: tensor for own in read.values() for key, tensor in own.items()}
        count = min(map(len, (ids, *tensors.values())))
        writer = Writer(decoder, [(modality, len(own) > 1) for modality, own in read.items()]).eval()
        batch, any_length = torch.export.Dim("batch"), torch.export.Dim.AUTO
        sizes = ({0: batch, 1: any_length}, tuple({0: batch, 1: any_length} for _ in tensors))
        # the ids but the last: shorter than the tokens of the side that is written, which may be longer
        inputs = {"ids": ids[:count, :-1]} | {key: tensor[:count] for key, tensor in tensors.items()}
        what = f"heads.{name} ({decoder.name!r})"
        self._trace(writer, inputs, sizes, ["logits"], folder / f"heads.{name}.onnx", what)
        ends = {"start": vocabulary.start, "end": vocabulary.end, "context": vocabulary.longest}
        return {"file": f"heads.{name}.onnx", "inputs": [*inputs], "output": "logits", "writes": writes} | ends

    def _trace(
        self,
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        sizes: tuple[Any, ...],
        outputs: list[str],
        file: Path,
        what: str,
    ) -> None:
        fits_inside = sum(p.numel() * p.element_size() for p in module.parameters()) < MOST_INSIDE
        try:
            with quiet():
                torch.onnx.export(
                    module,
                    tuple(inputs.values()),
                    str(file),
                    dynamo=True,
                    dynamic_shapes=sizes,
                    input_names=[*inputs],
                    output_names=outputs,
                    external_data=not fits_inside,
                    verbose=False,
                )
        except Exception as error:
            raise UserError(f"--to onnx: {what} cannot be traced by torch.onnx: {_first_line(error)}") from error

    def _about(self, name: str, x: Tensor) -> dict[str, Any]:
        if not x.is_floating_point():
            config: Any = self.subject.model.backbone[name].config
            return {"dtype": "int64", "shape": ["batch", "length"], "context": getattr(config, "context", None)}
        options: Any = self.subject.model.augment[name].config
        resize = {"resize": "shorter side, bicubic; centre crop", "mean": options.mean, "std": options.std}
        return {"dtype": "float32", "shape": ["batch", *x.shape[1:]]} | resize

    def open(self, folder: Path) -> None:
        """Open a session for each file, on the CPU."""
        self.sessions = {
            name: self.library.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            for name in (*self.modalities, *(f"heads.{head}" for head in self.writers))
        }

    def _run(self, file: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one file, by name, of those of the inputs that it has."""
        session = self.sessions[file]
        arrays = {own.name: inputs[own.name].numpy() for own in session.get_inputs()}
        try:
            outputs = session.run(None, arrays)
        except Exception as error:
            shapes = ", ".join(str(list(array.shape)) for array in arrays.values())
            raise UserError(f"--to onnx: {file}.onnx does not run on {shapes}: {_first_line(error)}") from error
        return {own.name: torch.from_numpy(x) for own, x in zip(session.get_outputs(), outputs, strict=True)}

    def decoders(self) -> dict[str, Decode]:
        """All whose towers are exported, each given what those files make of the items."""

        def decode(name: str, decoder: Decoder, items: Mapping[str, Sequence[Any]]) -> Tensor:
            writes = decoder.writes(decoder.config)
            tensors = {"ids": self.subject.inputs(writes, items[writes])}
            for modality in decoder.reads(decoder.config):
                tensors |= self._run(modality, {modality: self.subject.inputs(modality, items[modality])})
            return self._run(f"heads.{name}", tensors)["logits"]

        return {name: partial(decode, name, decoder) for name, decoder in self.writers.items()}

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Embed the whole batch, then single items and groups of three: they must agree, or the batch is not dynamic.
        Then each text at its own length, without padding to others."""

        def run(part: Tensor) -> Tensor:
            return self._run(modality, {modality: part})[f"{modality}_embedding"]

        whole = run(x)
        for size in (1, 3):
            parts = torch.cat([run(part) for part in x.split(size)])  # type: ignore[no-untyped-call]
            if not torch.allclose(parts, whole, atol=1e-5, rtol=0):
                raise UserError(f"--to onnx: {modality}.onnx gives other embeddings in batches of {size}")
        if not x.is_floating_point():
            texts = [self.subject.inputs(modality, [text]) for text in self.subject.items(modality)]
            single = torch.cat([run(text) for text in texts])
            if not torch.allclose(single, whole, atol=1e-5, rtol=0):
                raise UserError(f"--to onnx: {modality}.onnx gives other embeddings of texts of another length")
        return whole


FORMATS: dict[str, type[Format]] = {"open_clip": OpenClipFormat, "hf": HfFormat, "onnx": OnnxFormat}


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses other libraries' progress bars, warnings and logs."""
    import io
    import logging
    import warnings
    from contextlib import redirect_stderr, redirect_stdout

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
