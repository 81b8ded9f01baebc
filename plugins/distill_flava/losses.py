"""FLAVA's losses (section 3.2) beside the contrastive one: masked language, masked image, masked multimodal, matching.

Over several ranks each is a mean over this rank's own hidden tokens or pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss

from distill_core import Features, Group, Loss, LossConfig, Needs, Outputs, Plan, Scheduled, UserError, wide
from distill_flava.fusion import MultimodalEncoder
from distill_vl.masking import MASKED, tokens_at
from distill_vl.tokenizer import VOCABULARY

Vocabulary = Annotated[int, Field(ge=VOCABULARY)]
Patch = Annotated[int, Field(gt=0)]


class PredictionHead(nn.Module):
    """Linear, GELU, LayerNorm, linear: what FLAVA (and BERT) puts after a hidden token.

    The last layer is computed in fp32 under autocast, too: in bf16, logits of some ten are good to a sixteenth.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, W] -> fp32 (or wider) [N, outputs]."""
        hidden: Tensor = self.norm(nn.functional.gelu(self.dense(x)))
        with torch.autocast(x.device.type, enabled=False):
            return linear(wide(hidden), wide(self.decoder.weight), wide(self.decoder.bias))


def masked_group(who: str, outputs: Outputs, modality: str, role: str) -> tuple[int, Group, Tensor]:
    """(number of its first view, group, targets) of the views of a role.

    Raises `UserError` where the backbone's collator gave no mask or no targets.
    """
    for start, group in outputs.views[modality].numbered():
        if group.role == role:
            if group.token_mask is None or group.targets is None:
                what = "mask" if group.token_mask is None else "targets"
                raise UserError(
                    f"{who}: the {role} views of {modality!r} came with no {what}; set backbone.{modality}.masking "
                    f"with roles: [{role}]" + ("" if what == "mask" else ", and its targets")
                )
            return start, group, group.targets
    raise UserError(f"{who}: no view of {modality!r} has the role {role!r}")


def hidden_tokens(
    who: str, outputs: Outputs, modality: str, role: str, tokens: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of all masked views of a role: `tokens` [N, W], by the number of the view, and targets [N, ...]."""
    start, group, targets = masked_group(who, outputs, modality, role)
    places = group.places()
    return (
        torch.cat([tokens_at(tokens[start + i], where) for i, where in enumerate(places)]),
        torch.cat([tokens_at(x, where) for x, where in zip(targets, places, strict=True)]),
    )


def masked_language(head: PredictionHead, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, accuracy) of hidden tokens [N, W] against ids [N]; 0 of none."""
    logits = head(tokens)
    count = max(len(targets), 1)
    right = (logits.detach().argmax(-1) == targets).sum() / count
    return cross_entropy(logits, targets, reduction="sum") / count, right


def masked_image(who: str, head: PredictionHead, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of hidden patches [N, W] against pixels [N, 3 * p * p]; 0 of none."""
    values, out_features = targets.shape[-1], head.decoder.out_features
    if values != out_features:
        raise UserError(
            f"{who}: a patch has {values} pixel values, the head makes {out_features}; set patch to the backbone's"
        )
    predicted = head(tokens)
    return mse_loss(predicted, targets.to(predicted.dtype), reduction="sum") / max(targets.numel(), 1)


def masked_needs(config: MaskedLanguageConfig | MaskedImageConfig, plan: Plan) -> Needs:
    """Masked views of one modality, and their tokens."""
    m, tokens = config.modality, {config.modality: plan.modalities[config.modality].views(config.role)}
    return Needs(student=(m,), tokens=tokens, whole=tokens, views={m: {config.role: 1}}, masked=(m,), embeddings=())


class MaskedLanguageConfig(LossConfig):
    """Which views are read."""

    modality: str = "text"
    """The modality whose hidden tokens are predicted."""
    role: str = MASKED
    """The role of its masked views."""
    vocabulary: Vocabulary = VOCABULARY
    """Ids that are told apart."""


class MaskedLanguage(Loss):
    """Cross-entropy of the text tower's hidden tokens against their ids."""

    name = "flava_mlm"
    Config = MaskedLanguageConfig
    across_ranks = False
    partial = True

    def __init__(self, config: MaskedLanguageConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.head = PredictionHead(plan.modalities[config.modality].spec.width, config.vocabulary)

    @classmethod
    def needs(cls, config: MaskedLanguageConfig, plan: Plan) -> Needs:
        """Masked views and their tokens."""
        return masked_needs(config, plan)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term, over all masked views; the share of hidden tokens that is predicted right."""
        m = self.config.modality
        tokens, targets = hidden_tokens(self.name, outputs, m, self.config.role, outputs.student[m].tokens)
        term, accuracy = masked_language(self.head, tokens, targets)
        return {"mlm": term}, {"accuracy": accuracy}


class MaskedImageConfig(LossConfig):
    """Which views are read."""

    modality: str = "image"
    """The modality whose hidden patches are predicted."""
    role: str = MASKED
    """The role of its masked views."""
    patch: Patch = 16
    """Pixels of a patch's side, as the backbone's."""


class MaskedImage(Loss):
    """Squared error of the image tower's hidden patches against their normalised pixels.

    FLAVA predicts the ids of a discrete autoencoder; its weights are not to be had, so these are MAE's targets.
    """

    name = "flava_mim"
    Config = MaskedImageConfig
    across_ranks = False
    partial = True

    def __init__(self, config: MaskedImageConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.head = PredictionHead(plan.modalities[config.modality].spec.width, 3 * config.patch**2)

    @classmethod
    def needs(cls, config: MaskedImageConfig, plan: Plan) -> Needs:
        """Masked views and their tokens."""
        return masked_needs(config, plan)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term, over all masked views."""
        m = self.config.modality
        tokens, targets = hidden_tokens(self.name, outputs, m, self.config.role, outputs.student[m].tokens)
        return {"mim": masked_image(self.name, self.head, tokens, targets)}, {}


class MaskedMultimodalConfig(LossConfig):
    """Which views are read."""

    modalities: tuple[str, str] = ("image", "text")
    """The modality of patches, and that of tokens with ids."""
    role: str = MASKED
    """The role of the masked views; the fusion's too."""
    vocabulary: Vocabulary = VOCABULARY
    """Ids that are told apart."""
    patch: Patch = 16
    """Pixels of a patch's side, as the backbone's."""


class MaskedMultimodal(Loss):
    """Hidden tokens and hidden patches of a pair, predicted from the multimodal encoder's outputs."""

    name = "flava_mmm"
    Config = MaskedMultimodalConfig
    across_ranks = False
    partial = True

    def __init__(self, config: MaskedMultimodalConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        dim = plan.modalities[config.modalities[0]].spec.dim
        self.image_head = PredictionHead(dim, 3 * config.patch**2)
        self.text_head = PredictionHead(dim, config.vocabulary)

    @classmethod
    def needs(cls, config: MaskedMultimodalConfig, plan: Plan) -> Needs:
        """Fused tokens of masked views."""
        views = {m: {config.role: 1} for m in config.modalities}
        whole = {m: plan.modalities[m].views(config.role)[:1] for m in config.modalities}
        return Needs(fused=config.modalities, whole=whole, views=views, masked=config.modalities, embeddings=())

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two terms, `text` and `image`. Raises `UserError` where the fusion has not fused the masked views."""
        fusion, role = outputs.fusion, self.config.role
        if not isinstance(fusion, MultimodalEncoder) or fusion.config.role != role:
            raise UserError(
                f"{self.name}: reads fused tokens of the {role} views; the fusion must be "
                f"{{name: multimodal_encoder, role: {role}}}"
            )
        image, text = self.config.modalities
        picture = masked_image(self.name, self.image_head, *self._hidden(outputs, image))
        words, accuracy = masked_language(self.text_head, *self._hidden(outputs, text))
        return {"text": words, "image": picture}, {"accuracy": accuracy}

    def _hidden(self, outputs: Outputs, modality: str) -> tuple[Tensor, Tensor]:
        """The fused tokens of the first masked view where they were hidden [N, D], and their targets [N, ...]."""
        _, group, targets = masked_group(self.name, outputs, modality, self.config.role)
        tokens, where = outputs.fused[modality].tokens, group.places()[0]
        assert tokens is not None  # the multimodal encoder gives them
        return tokens_at(tokens, where), tokens_at(targets[0], where)


class ImageTextMatchingConfig(LossConfig):
    """Which pairs are mismatched."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities; the second's samples are exchanged."""
    negatives: Literal["next", "hard"] = "next"
    """The partner in a mismatched pair: the batch's next sample, or one drawn by its similarity (ALBEF)."""
    temperature: Scheduled[Annotated[float, Field(gt=0)]] = Scheduled(0.07)
    """Of the odds that `hard` draws with: softmax(similarity / temperature), the true partner left out. Also a
    schedule."""


class ImageTextMatching(Loss):
    """Binary classification from the fused embedding: does the text belong to the image? Half of the pairs do.

    The fusion is called again on mismatched features. Pairs are those of this rank.
    """

    name = "flava_itm"
    Config = ImageTextMatchingConfig
    across_ranks = False
    partial = True

    def __init__(self, config: ImageTextMatchingConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        dim = plan.modalities[config.modalities[0]].spec.dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 2))

    @classmethod
    def needs(cls, config: ImageTextMatchingConfig, plan: Plan) -> Needs:
        return Needs(fused=config.modalities)

    @classmethod
    def problems(cls, config: ImageTextMatchingConfig, plan: Plan) -> Iterable[str]:
        if config.modalities[0] == config.modalities[1]:
            yield f"{cls.name!r} needs two different modalities"

    def units(self) -> Sequence[nn.Module]:
        """The head: the fusion, called in between, need not be one graph."""
        return (self.head,)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term: the mean cross-entropy over B pairs that match and B that do not (none in a batch of one)."""
        first, second = self.config.modalities
        pairs = [outputs.fused[first].embedding[0]]
        batch = len(pairs[0])
        if batch > 1:
            assert outputs.fusion is not None
            partner = self.partners(outputs, batch)
            mixed = outputs.fusion({**outputs.student, second: take(outputs.student[second], partner)})
            pairs.append(mixed[first].pooled[0])
        x = torch.cat(pairs)
        # back to the spread that the encoder's LayerNorm gave it
        logits = wide(self.head(x * x.shape[-1] ** 0.5))
        matched = (torch.arange(len(x), device=x.device) < batch).long()
        accuracy = (logits.detach().argmax(-1) == matched).to(logits.dtype).mean()
        return {"itm": cross_entropy(logits, matched)}, {"accuracy": accuracy}

    @torch.no_grad()
    def partners(self, outputs: Outputs, batch: int) -> Tensor:
        """[B]: whose second modality each sample's first is mismatched with; never its own. `hard` draws from torch's
        generator."""  # fmt: skip
        first, second = (outputs.student[m].embedding[0] for m in self.config.modalities)
        own = torch.arange(batch, device=first.device)
        if self.config.negatives == "next":
            return (own + 1) % batch
        temperature = self.config.temperature.value(outputs.progress)
        odds = (first @ second.T / temperature).fill_diagonal_(float("-inf")).softmax(-1)
        return torch.multinomial(odds, 1)[:, 0]


def take(features: Features, index: Tensor) -> Features:
    """The features of samples `index` [B]."""
    classes = features.class_tokens
    return Features(
        features.pooled[:, index],
        {view: x[index] for view, x in features.tokens.items()},
        {view: x[index] for view, x in features.masks.items()},
        None if classes is None else classes[:, index],
        {layer: {view: x[index] for view, x in views.items()} for layer, views in features.layers.items()},
    )
