"""Scores of a trained model."""

from distill_core import DataError, Score, Task, TaskConfig, mean_over_sets


class AgreementConfig(TaskConfig):
    """Options of `my_plugin_agreement`."""

    modalities: tuple[str, str] | None = None
    """The two sides; null takes the recipe's first two."""


class Agreement(Task):
    """Mean cosine of the two embeddings of a sample, times 100."""

    name = "my_plugin_agreement"
    Config = AgreementConfig

    @classmethod
    def problems(cls, config, plan):
        """Two modalities that the recipe has; `MissingModality` says which one it lacks."""
        for name in config.modalities or ():
            plan.modalities[name]
        if config.modalities is None and len(plan.modalities) < 2:
            yield "'my_plugin_agreement' needs two modalities"

    @classmethod
    def means(cls, config):
        """A recipe whose `train.checkpoint.best` names another mean is refused at once. Optional."""
        return ("cosine",)

    def run(self, model, sets):
        """`cosine` of each set, and the mean over sets."""
        a, b = self.config.modalities or model.modalities[:2]
        scores = []
        for samples in sets:
            first, first_of = samples.embeddings(model, a)  # [N, D], [N]: the samples they are of
            second, second_of = samples.embeddings(model, b)
            place = {owner: i for i, owner in enumerate(second_of.tolist())}
            pairs = [(i, place[owner]) for i, owner in enumerate(first_of.tolist()) if owner in place]
            if not pairs:
                raise DataError(f"evaluation set {samples.name!r}: no sample with both {a} and {b}")
            rows, columns = zip(*pairs, strict=True)
            cosines = (first[list(rows)] * second[list(columns)]).sum(-1)
            cosine = 100 * cosines.double().mean().item()
            scores.append(Score(samples.name, "cosine", cosine, unit="cosine x 100", headline=True))
        return [*scores, *mean_over_sets(scores)]

    def note(self):
        """Caption of the table of scores."""
        return "cosine times 100: 100 where both sides agree, 0 where they know nothing of each other"
