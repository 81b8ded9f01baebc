"""A decoder, and decoders that are broken in one way each."""

import torch
from components_to_check.broken import broken
from torch import nn

from distill_core import ComponentConfig, Decoder


class Speller(Decoder):
    """The mean of what is read, and the ids so far, each with a weight of its own; then a linear map to the ids."""

    name = "speller"
    Config = ComponentConfig

    def __init__(self, config, plan):
        super().__init__(config, plan)
        vocabulary = plan.modalities["second"].spec.vocabulary
        self.embedding = nn.Embedding(vocabulary.size, 16)
        self.part = nn.Sequential(nn.Linear(plan.modalities["first"].spec.width, 16), nn.Tanh())
        self.out = nn.Linear(16, vocabulary.size)

    @classmethod
    def writes(cls, config):
        return "second"

    @classmethod
    def reads(cls, config):
        return ("first",)

    def units(self):
        return (self.part,)

    def forward(self, encoded, ids, rows=None):
        first = encoded["first"]
        real = (
            first.tokens.new_ones(first.tokens.shape[:2]) if first.mask is None else first.mask.to(first.tokens.dtype)
        )
        mean = (self.part(first.tokens) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        x = self.read(self.embedding(ids)) + mean[:, None]
        x = self.out(x).float()
        return x if rows is None else x.flatten(0, 1)[rows]

    def read(self, x):
        return x.cumsum(1)


@broken("logits", r"logits are \[3, 3, 7\], not \[N, L, S\] = \[3, 4, 7\]")
class DropsTheLast(Speller):
    def forward(self, encoded, ids, rows=None):
        return super().forward(encoded, ids, rows)[:, :-1]


@broken("logits", "compute them in fp32")
class HalfLogits(Speller):
    def forward(self, encoded, ids, rows=None):
        return super().forward(encoded, ids, rows).bfloat16()


@broken("logits", "logits at `rows` are not those")
class CountsRowsByPlace(Speller):
    def forward(self, encoded, ids, rows=None):
        out = super().forward(encoded, ids)
        return out if rows is None else out.transpose(0, 1).flatten(0, 1)[rows]


@broken("looks_back", "an id changes the logits of places before it")
class LooksAhead(Speller):
    def read(self, x):
        return x.flip(1).cumsum(1).flip(1)


@broken("looks_back", "logits depend on the length")
class CountsTheLength(Speller):
    def read(self, x):
        return x.cumsum(1) / x.shape[1]


@broken("looks_back", "logits do not depend on the ids")
class Deaf(Speller):
    def read(self, x):
        return 0 * x


@broken("padding", "padded tokens change the logits")
class ReadsPadding(Speller):
    def forward(self, encoded, ids, rows=None):
        encoded["first"].mask = None
        return super().forward(encoded, ids, rows)


@broken("inputs_untouched", "tokens in place, which others read")
class ChangesTokens(Speller):
    def forward(self, encoded, ids, rows=None):
        with torch.no_grad():
            encoded["first"].tokens.mul_(1.1)
        return super().forward(encoded, ids, rows)


@broken("gradients", "no gradient reaches part.0.weight")
class DetachesWhatItReads(Speller):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.part.register_forward_hook(lambda module, args, out: out.detach())


@broken("state_dict", "state")
class ForgetsItsShift(Speller):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.shift = torch.randn(())

    def read(self, x):
        return x.cumsum(1) + self.shift


@broken("copied", "copy")
class SharesATable(Speller):
    def __deepcopy__(self, memo):
        return self


@broken("autocast", "bf16 autocast is far from fp32")
class LosesItselfInHalf(Speller):
    def forward(self, encoded, ids, rows=None):
        x = super().forward(encoded, ids, rows)
        return x.flip(-1) if torch.is_autocast_enabled("cpu") else x


@broken("units", "not called in a step")
class CallsAMethodOfItsUnit(Speller):
    def forward(self, encoded, ids, rows=None):
        first = encoded["first"]
        mean = self.part[1](self.part[0](first.tokens)).mean(1)
        x = self.out(self.read(self.embedding(ids)) + mean[:, None]).float()
        return x if rows is None else x.flatten(0, 1)[rows]
