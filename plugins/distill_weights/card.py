"""The model card (README.md) of exported weights: how to load them, recipe, data, scores, licence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distill_core.tools import means, read_scores

if TYPE_CHECKING:
    from distill_weights.export import CheckResult
    from distill_weights.subject import Subject

_USE = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenize = open_clip.get_tokenizer("local-dir:FOLDER")
pictures = model.encode_image(preprocess(picture)[None], normalize=True)
texts = model.encode_text(tokenize(["a red bird"]), normalize=True)
""",
    "hf": """\
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
inputs = processor(text=["a red bird"], images=[picture], padding=True, truncation=True, return_tensors="pt")
similarity = model(**inputs).logits_per_image
""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/NAME.onnx")
(embeddings,) = session.run(["NAME_embedding"], {"NAME": inputs})  # [N, D], L2-normalised
""",
}
_DECODERS = (
    "`heads.NAME.onnx` takes `ids` [N, L] so far, the first of each `start`, and the outputs of the towers that its "
    "`inputs` in `preprocess.json` name; it gives `logits` [N, L, S] of the id that follows each, up to `end`."
)
_TEXTS = {
    "open_clip": "open_clip's tokenizer does the same.",
    "hf": (
        "CLIPTokenizer does neither: where texts hold typographic quotes or entities (it’s “fine”, Tom &amp; Jerry), "
        "first apply `html.unescape(html.unescape(ftfy.fix_text(text)))`; else the ids differ."
    ),
}
_LIBRARY = {"open_clip": "open_clip", "hf": "transformers", "onnx": "onnx"}


def card(subject: Subject, to: str, checks: Sequence[CheckResult], notes: Sequence[str], licence: str) -> str:
    """Markdown with the front matter that model hubs read."""
    recipe, run = public(subject.recipe), subject.run
    report = _report(subject)
    head = {
        "license": licence,
        "library_name": _LIBRARY[to],
        "pipeline_tag": "zero-shot-image-classification" if to != "onnx" else "feature-extraction",
        "tags": ["distill", to, *dict.fromkeys(_names(recipe))],
        "datasets": [recipe["data"]["source"]["name"]],
    }
    differences = [
        f"| {check.part} | {check.samples} | {check.difference:.1e} | {check.comparison or '-'} |" for check in checks
    ]
    use = _USE[to].replace("NAME", checks[0].part)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {run.name}",
        f"The {subject.side} of the run `{run.name}` at step {subject.step}, trained with distill.",
        "## Use",
        f"```python\n{use}```",
        _preprocessing(subject, to),
        *([_DECODERS] if any(check.of == "logits" for check in checks) else []),
        "## Compared",
        "The same inputs through the run and this export, fp32; the largest difference of L2-normalised embeddings"
        + ("; of logits, as a share of the largest." if any(check.of == "logits" for check in checks) else "."),
        "| part | samples | maximum difference | preprocessing |\n|---|---|---|---|\n" + "\n".join(differences),
        *(f"- Left out: {path} ({name})." for path, name in subject.left_out.items()),
        *(f"- {note}" for note in notes),
        "## Data",
        f"Source: `{recipe['data']['source']['name']}`. The licence of the data: to be filled in by the publisher.",
        "## Scores",
        _scores(subject, report),
        "## Licence",
        "Of the weights: "
        + (licence if licence != "unknown" else "not stated (`distill export --licence`); the data's terms apply."),
        "## Recipe",
        "Without tracking; data sources and initial weights by name alone, local paths by their last part.",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)}```",
    ]
    return "\n\n".join(parts) + "\n"


def public(recipe: Any) -> Any:
    """A resolved recipe without what may be private: trackers, options of sources and `weights`, paths of files."""
    if isinstance(recipe, dict):
        names_only = {key: _name_alone(value) for key, value in recipe.items() if key in ("source", "weights")}
        return {
            key: names_only[key] if key in names_only else public(value)
            for key, value in recipe.items()
            if key != "tracking"
        }
    if isinstance(recipe, list | tuple):
        return [public(value) for value in recipe]
    return Path(recipe).name if isinstance(recipe, str) and Path(recipe).expanduser().is_absolute() else recipe


def _name_alone(node: Any) -> Any:
    """The name of each component in a node; None for a bare string, which is a path or an address."""
    if isinstance(node, list | tuple):
        return [_name_alone(item) for item in node]
    return {"name": node["name"]} if isinstance(node, dict) and "name" in node else None


def _names(recipe: dict[str, Any]) -> list[str]:
    fusion = [*([recipe["fusion"]] if recipe.get("fusion") else []), *recipe.get("fusions", {}).values()]
    nodes = [*recipe["backbone"].values(), *fusion, *recipe.get("heads", {}).values(), *recipe["loss"]]
    return [node["name"] for node in nodes if "name" in node]  # `same` is another one's


def _preprocessing(subject: Subject, to: str) -> str:
    lines = []
    for name, augmentation in subject.model.augment.items():
        options: Any = augmentation.config
        if hasattr(options, "mean") and hasattr(options, "size"):
            lines.append(
                f"`{name}`: the shorter side to {options.size} px (bicubic), the centre cropped, (pixel / 255 - "
                f"{[round(x, 6) for x in options.mean]}) / {[round(x, 6) for x in options.std]}; transparent "
                f"pixels over {list(options.background)}, which other libraries do not do."
            )
    if to == "onnx":
        lines.append(
            "`preprocess.json` says what each file takes; tokens come from the tokenizer of the recipe's text backbone."
        )
    else:
        lines.append(f"In training, texts are repaired (ftfy) and HTML entities undone, then tokenised. {_TEXTS[to]}")
    return "\n\n".join(lines)


def _report(subject: Subject) -> dict[str, Any] | None:
    path = subject.run / "report.json"
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _scores(subject: Subject, report: dict[str, Any] | None) -> str:
    if report is None:
        return "The run was not evaluated."
    rows = [
        f"| {score.task} {score.name} | {score.value:.2f} |"
        for score in means(read_scores(report["scores"]))
        if score.side == subject.side
    ]
    if not rows:
        return f"The run has no scores of the {subject.side}."
    where = "" if report["steps"] == subject.step else f" **The exported step is {subject.step}.**"
    return (
        f"On the split `{report['split']}` after {report['steps']} steps ({report['samples']} samples).{where}\n\n"
        "| score | |\n|---|---|\n" + "\n".join(rows)
    )
