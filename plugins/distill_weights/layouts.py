"""Names of the same tensors in open_clip (OpenAI's too), Hugging Face CLIP and SigLIP, and timm, and what their configs
say.

The layout in the middle is open_clip's: `visual.*` for the picture's tower, the text's tower bare. Our `vit` and
`clip_text` name their parameters the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill_core import StateDict, UserError

IMAGE = "visual."
TEXT_PARTS = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
SCALES = ("logit_scale", "logit_bias")
Pixels = tuple[list[float], list[float]]
"""Mean and std of each channel."""
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
"""Scalars that the state dicts of OpenAI's archives hold beside the weights."""


@dataclass
class Source:
    """Towers under our parameters' names, and options that the source states and tensors do not show."""

    what: str
    towers: dict[str, StateDict] = field(default_factory=lambda: {"image": {}, "text": {}})
    scale: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=lambda: {"image": {}, "text": {}})
    pixels: Pixels | None = None
    """Mean and std that images were normalised with; None if not stated."""
    notes: list[str] = field(default_factory=list)
    """Remarks on how it was read, for the user."""


def pixels(config: Any, mean: str, std: str) -> Pixels | None:
    """These two entries of a config, if each is three numbers."""
    values: list[Any] = [config.get(name) for name in (mean, std)] if isinstance(config, Mapping) else [None]
    if not all(isinstance(p, list) and len(p) == 3 and all(isinstance(x, int | float) for x in p) for p in values):
        return None
    return values[0], values[1]


def from_open_clip(state: Mapping[str, Tensor], config: Mapping[str, Any] | None, what: str) -> Source:
    """A state dict of open_clip or OpenAI, with open_clip's `model_cfg` where there is one. Raises `UserError`."""
    source = Source(what)
    openai = any(mark in state for mark in OPENAI_MARKS)
    unknown = []
    for key, value in state.items():
        name = key.removeprefix("text.") if key.startswith("text.") else key
        if key in OPENAI_MARKS or key.endswith("attn_mask"):
            continue
        if key.startswith(IMAGE):
            source.towers["image"][key.removeprefix(IMAGE)] = value
        elif name in SCALES:
            source.scale[name] = value
        elif name.startswith(TEXT_PARTS):
            source.towers["text"][name] = value
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"weights: {what}: {unknown[0]} is no tensor of a CLIP with two transformers")
    if "layer1.0.conv1.weight" in source.towers["image"]:
        raise UserError(f"weights: {what}: its picture tower is a ResNet; `vit` takes Vision Transformers only")
    if openai:
        source.options = {tower: {"activation": "quick_gelu"} for tower in source.options}
        for tower, tensors in source.towers.items():
            source.options[tower]["heads"] = _width(tensors) // 64
    if config is not None:
        source.options = _options_of_open_clip(config, what)
    return source


def _width(tower: Mapping[str, Tensor]) -> int:
    return int(tower["positional_embedding"].shape[1]) if "positional_embedding" in tower else 0


_KNOWN = {
    "image": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "norm_kwargs",
              "patch_dropout", "output_tokens"},
    "text": {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "output_tokens",
             "pad_id", "eos_id"},
}  # fmt: skip
_USUAL = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "block_type": ("default",), "attn_pooler_queries":
          (256,), "attn_pooler_heads": (8,), "pos_embed_type": ("learnable",)}  # fmt: skip


def _options_of_open_clip(config: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(config.get(section) or {}, Mapping):
            raise UserError(f"weights: {what}: {section} is no object of options")
    image, text = dict(config.get("vision_cfg") or {}), dict(config.get("text_cfg") or {})
    for name, part in (("image", image), ("text", text)):
        for key, value in part.items():
            if value and key not in _KNOWN[name] and value not in _USUAL.get(key, ()):
                section = "vision_cfg" if name == "image" else "text_cfg"
                raise UserError(
                    f"weights: {what}: {section}.{key} is {value!r}; the built-in towers have no such thing"
                )
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    norm = image.get("norm_kwargs") or {}
    return {
        "image": {
            "activation": activation,
            "heads": image.get("width", 768) // image.get("head_width", 64),
            "pre_norm": not image.get("no_ln_pre", False),
            "norm_eps": norm.get("eps", 1e-5),
        },
        "text": {"activation": activation, "heads": text.get("heads", 8)},
    }


def open_clip_config(
    image: Any, text: Any, *, size: int, mean: tuple[float, ...], std: tuple[float, ...], bias: bool
) -> dict[str, Any]:
    """`open_clip_config.json` of our towers' configs. Raises `UserError` for what open_clip has no option for."""
    if image.activation != text.activation:
        raise UserError(
            f"open_clip has one activation for both towers; activation is {image.activation} and {text.activation}"
        )
    if image.activation == "gelu_tanh":
        raise UserError("open_clip's own towers have gelu or quick_gelu; activation is gelu_tanh. Try --to onnx")
    vision: dict[str, Any] = {
        "image_size": size,
        "patch_size": image.patch,
        "width": image.width,
        "layers": image.layers,
        "head_width": image.width // image.heads,
        "mlp_ratio": image.mlp_ratio,
    }
    if not image.pre_norm:
        vision["no_ln_pre"] = True
    if image.norm_eps != 1e-5:
        vision["norm_kwargs"] = {"eps": image.norm_eps}
    model: dict[str, Any] = {
        "embed_dim": image.dim,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
        },
        "quick_gelu": image.activation == "quick_gelu",
    }
    if bias:
        model["init_logit_bias"] = 0.0
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


Names = dict[str, tuple[str, ...]]
"""Our name -> theirs; several of theirs are concatenated."""


def _blocks(layers: int, theirs: str, parts: Mapping[str, str], attention: tuple[str, ...]) -> Names:
    """Names of the blocks: `parts` are modules with weight and bias, `attention` what makes our `attn.in_proj`."""
    names: Names = {}
    for i in range(layers):
        block, other = f"transformer.resblocks.{i}", f"{theirs}.{i}"
        for kind in ("weight", "bias"):
            names[f"{block}.attn.in_proj_{kind}"] = tuple(f"{other}.{part}.{kind}" for part in attention)
            names |= {f"{block}.{ours}.{kind}": (f"{other}.{part}.{kind}",) for ours, part in parts.items()}
    return names


def _norm(ours: str, theirs: str) -> Names:
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}


def _layers(state: Iterable[str], start: str) -> int:
    """How many blocks there are, from names such as `START3.`."""
    return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})


def _rename(state: Mapping[str, Tensor], names: Names) -> tuple[StateDict, set[str]]:
    """The entries of `names` that the state holds completely, under our names; and the keys that were used."""
    complete = {ours: theirs for ours, theirs in names.items() if all(key in state for key in theirs)}
    used = {key for theirs in complete.values() for key in theirs}
    return {ours: torch.cat([state[key] for key in theirs]) for ours, theirs in complete.items()}, used


def _hf_blocks(layers: int) -> Names:
    """Of the towers of CLIP and SigLIP, with their positions."""
    names = _blocks(
        layers,
        "encoder.layers",
        {
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        },
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    )
    return names | {"positional_embedding": ("embeddings.position_embedding.weight",)}


HF_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
"""Ours -> theirs, where the names differ."""
_OUR_ACTIVATIONS = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()}


def _hf_names(tower: str, layers: int) -> Names:
    names = _hf_blocks(layers)
    if tower == "text":
        return (
            names
            | {"token_embedding.weight": ("embeddings.token_embedding.weight",)}
            | _norm("ln_final", "final_layer_norm")
        )
    names |= {
        "class_embedding": ("embeddings.class_embedding",),
        "conv1.weight": ("embeddings.patch_embedding.weight",),
    }
    return names | _norm("ln_pre", "pre_layrnorm") | _norm("ln_post", "post_layernorm")


_HF_PROJECTIONS = {"image": ("visual_projection.weight", "proj"), "text": ("text_projection.weight", "text_projection")}


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> Source:
    """The state dict and config of a Hugging Face `CLIPModel`. Raises `UserError`."""
    if config.get("model_type") != "clip":
        raise UserError(f"weights: {what}: config.json says model_type {config.get('model_type')!r}, not 'clip'")
    source = Source(what, scale={name: state[name] for name in SCALES if name in state})
    used = set(source.scale)
    for tower, prefix, section, heads in (
        ("image", "vision_model.", "vision_config", 12),
        ("text", "text_model.", "text_config", 8),
    ):
        part, section_config = source.towers[tower], config.get(section) or {}
        tower_state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        tensors, keys = _rename(tower_state, _hf_names(tower, _layers(tower_state, "encoder.layers.")))
        part |= tensors
        used |= {prefix + key for key in keys}
        their_name, our_name = _HF_PROJECTIONS[tower]
        if their_name in state:
            part[our_name] = state[their_name].T
            used.add(their_name)
        source.options[tower] = {
            "activation": _our_activation(section_config.get("hidden_act", "quick_gelu")),
            "heads": section_config.get("num_attention_heads", heads),
            "norm_eps": section_config.get("layer_norm_eps", 1e-5),
            "pre_norm": True,
        }
    unknown = [key for key in state if key not in used and not key.endswith("position_ids")]
    if unknown:
        raise UserError(f"weights: {what}: {unknown[0]} is no tensor of a CLIPModel")
    return source


def _our_activation(theirs: str) -> str:
    return _OUR_ACTIVATIONS.get(theirs, theirs)


def from_hf_siglip(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> Source:
    """The image tower in the state dict and config of a Hugging Face `SiglipModel` or `SiglipVisionModel`.

    Raises `UserError`. The patches' bias goes into the positions, as with timm's.
    """
    kind = config.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(f"weights: {what}: config.json says model_type {kind!r}, not 'siglip' or 'siglip_vision_model'")
    section: Mapping[str, Any] = (config.get("vision_config") or {}) if kind == "siglip" else config
    tensors = {
        key.removeprefix("vision_model."): value
        for key, value in state.items()
        if key not in SCALES and not key.startswith("text_model.")
    }
    names = _hf_blocks(_layers(tensors, "encoder.layers."))
    names |= {"conv1.weight": ("embeddings.patch_embedding.weight",)} | _norm("ln_post", "post_layernorm")
    names |= _pool_names("head", ("attention.in_proj_",), {"attn.out_proj": "attention.out_proj", "ln": "layernorm"})
    image, used = _rename(tensors, names)
    bias, probe = "embeddings.patch_embedding.bias", "head.probe"
    unknown = [
        key for key in tensors if key not in used and key not in (bias, probe) and not key.endswith("position_ids")
    ]
    if unknown or probe not in tensors or "positional_embedding" not in image:
        reason = f"{unknown[0]} is no tensor" if unknown else "it lacks the pooling head or the positions"
        raise UserError(f"weights: {what}: {reason} of SigLIP's image tower")
    if bias in tensors:
        image["positional_embedding"] = image["positional_embedding"].float() + tensors[bias].float()
    source = Source(what, {"image": _with_probe(image, tensors[probe]), "text": {}})
    source.options["image"] = {
        "activation": _our_activation(section.get("hidden_act", "gelu_pytorch_tanh")),
        "heads": section.get("num_attention_heads", 12),
        "norm_eps": section.get("layer_norm_eps", 1e-6),
        "pre_norm": False,
        "pooling": "attention",
    }
    return source


def _pool_names(theirs: str, projections: tuple[str, ...], parts: Mapping[str, str]) -> Names:
    """Of `vit`'s `attention_pool`, but for its query: `projections`, each with `weight` or `bias` after it, make our
    `attn.in_proj`."""
    parts = {**parts, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names: Names = {}
    for kind in ("weight", "bias"):
        names[f"attention_pool.attn.in_proj_{kind}"] = tuple(f"{theirs}.{part}{kind}" for part in projections)
        names |= {f"attention_pool.{ours}.{kind}": (f"{theirs}.{part}.{kind}",) for ours, part in parts.items()}
    return names


def _with_probe(image: StateDict, probe: Tensor) -> StateDict:
    """With the pooling's query, and the projection that leaves its result as it is: SigLIP's has none."""
    return image | {"attention_pool.probe": probe.flatten(), "proj": torch.eye(probe.shape[-1])}


def to_hf(towers: Mapping[str, Mapping[str, Tensor]]) -> StateDict:
    """Our `image` and `text` tower's tensors under the names of a `CLIPModel`."""
    state: StateDict = {}
    for tower, prefix in (("image", "vision_model."), ("text", "text_model.")):
        tensors, (projection, ours) = dict(towers[tower]), _HF_PROJECTIONS[tower]
        state[projection] = tensors.pop(ours).T
        for name, theirs in _hf_names(tower, _layers(tensors, "transformer.resblocks.")).items():
            parts = tensors.pop(name).chunk(len(theirs))
            state |= {prefix + key: value for key, value in zip(theirs, parts, strict=True)}
        assert not tensors, sorted(tensors)
    return {name: value.contiguous() for name, value in state.items()}


_SCALED = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}
"""LayerScale, by its names in timm and DINOv2, and in DeiT III -> the layer whose output it scales."""


def fold_layer_scale(state: Mapping[str, Tensor]) -> tuple[StateDict, int]:
    """The state without LayerScale, and how many there were: g * (W h + b) = (g * W) h + g * b, in fp32."""
    folded = dict(state)
    matches = [(key, match[1], match[2]) for key in state if (match := re.fullmatch(r"(blocks\.\d+\.)(.+)", key))]
    gammas = [(key, block + _SCALED[name]) for key, block, name in matches if name in _SCALED]
    gammas = [(key, layer) for key, layer in gammas if f"{layer}.weight" in state]
    for key, layer in gammas:
        gamma = folded.pop(key).float()
        folded[f"{layer}.weight"] = gamma[:, None] * folded[f"{layer}.weight"].float()
        if f"{layer}.bias" in folded:
            folded[f"{layer}.bias"] = gamma * folded[f"{layer}.bias"].float()
    return folded, len(gammas)


_REGISTERS = ("reg_token", "register_tokens")
"""timm's name, and DINOv2's own: [1, R, W]."""
_LACKS = (
    (r"blocks\.\d+\.mlp\.(w12|w3|fc1_g)\.", "a gated MLP (SwiGLU)"),
    (r"blocks\.\d+\.attn\.[qk]_norm\.", "LayerNorms of queries and keys"),
    (r"blocks\.\d+\.\d+\.", "blocks in chunks"),
    (r"blocks\.\d+\.attn\.(relative_position|rel_pos)", "relative positions"),
)
"""What other ViTs may have and `vit` does not, by their tensors' names."""


_POOL = "attn_pool.latent"
"""The query of timm's attention pooling (SigLIP's ViTs): [1, 1, W]."""


def _unlike_vit(state: Mapping[str, Tensor], used: Collection[str]) -> str | None:
    """Why a timm ViT does not fit `vit`, or None."""
    for pattern, what in _LACKS:
        if key := next((key for key in state if re.match(pattern, key)), None):
            return f"it has {what} ({key})"
    fc1, fc2 = (state.get(f"blocks.0.mlp.{part}.weight") for part in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:
        return "it has a gated MLP (SwiGLU) (blocks.0.mlp.fc1.weight)"
    pooled_by = _POOL if _POOL in state else "cls_token"
    if "pos_embed" not in state and pooled_by in state:
        return "it has no table of positions (pos_embed), as with rotary ones"
    if lacking := next((key for key in (pooled_by, "pos_embed", "patch_embed.proj.weight") if key not in state), None):
        return f"it has no {lacking}"
    if _POOL in state and state[_POOL].shape[1] > 1:
        return f"its pooling has {state[_POOL].shape[1]} queries (attn_pool.latent)"
    unknown = next((key for key in state if key not in used), None)
    return f"it has {unknown}" if unknown else None


def from_timm(state: Mapping[str, Tensor], what: str) -> Source:
    """A Vision Transformer of timm, DINO or DINOv2 (the same names); the head is left. Of open_clip's models with such
    a tower (SigLIP) the text is, too. Raises `UserError`.

    The patches' bias goes into the position embeddings: it is added at the same place, and resizing keeps constants.
    LayerScale goes into the layers whose outputs it scales. A class token without position (DeiT III) gets zeros.
    Register tokens (Darcet et al. 2024) are further class tokens of `vit`: neither has a position.
    """
    trunk = "visual.trunk."
    tensors = {key.removeprefix(trunk): value for key, value in state.items() if key.startswith(trunk)} or state
    tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    tensors = {key: value for key, value in tensors.items() if not key.startswith(("head.", "fc_norm.", "last_layer."))}
    tensors, scales = fold_layer_scale(tensors)
    names = _blocks(
        _layers(tensors, "blocks."),
        "blocks",
        {
            "ln_1": "norm1",
            "ln_2": "norm2",
            "attn.out_proj": "attn.proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        },
        ("attn.qkv",),
    )
    names |= {"conv1.weight": ("patch_embed.proj.weight",)} | _norm("ln_pre", "norm_pre") | _norm("ln_post", "norm")
    names |= _pool_names("attn_pool", ("q.", "kv."), {"attn.out_proj": "proj", "ln": "norm"})
    image, used = _rename(tensors, names)
    used |= {"cls_token", _POOL, "pos_embed", "patch_embed.proj.bias", "mask_token", *_REGISTERS}
    if unlike := _unlike_vit(tensors, used):
        raise UserError(
            f"weights: {what}: {unlike}, unlike `vit`: take weights that are like it, or the backbone "
            "{name: timm, model: MODEL} with the weights {name: timm, source: ...}, which takes any model of timm"
        )
    table = tensors["pos_embed"][0].float()  # sums in half precision would lose some of it
    has_class = _POOL not in tensors
    if has_class and round(len(table) ** 0.5) ** 2 == len(table):
        table = torch.cat([torch.zeros_like(table[:1]), table])
    if "patch_embed.proj.bias" in tensors:
        first = int(has_class)
        table = torch.cat([table[:first], table[first:] + tensors["patch_embed.proj.bias"].float()])
    image["positional_embedding"] = table
    if has_class:
        image["class_embedding"] = tensors["cls_token"].flatten()
    else:
        image = _with_probe(image, tensors[_POOL])
    is_plain_vit = "norm_pre.weight" not in tensors
    options: dict[str, Any] = {
        "pre_norm": not is_plain_vit,
        "norm_eps": 1e-6 if is_plain_vit else 1e-5,
        "pooling": "class_token" if has_class else "attention",
    }  # heads show nowhere
    if (registers := next((tensors[key][0] for key in _REGISTERS if key in tensors), None)) is not None:
        image["more_class_embeddings"] = registers
        options["class_tokens"] = 1 + len(registers)
    source = Source(what, {"image": image, "text": {}})
    if scales:
        source.notes.append(f"LayerScale was folded into {scales} layers (attn.proj, mlp.fc2)")
    # timm has SigLIP's first models with gelu, the later ones with gelu_tanh, under the same names
    source.options["image"] = options | ({"activation": "gelu"} if is_plain_vit and has_class else {})
    return source
