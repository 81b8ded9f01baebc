"""The model card that goes along with an export."""

import html
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ftfy
import pytest
import yaml
from score_values import means

import distill_core
from distill_weights.card import public
from tests.weights.conftest import call


@pytest.mark.slow
def test_the_card(make_run: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    run = make_run()
    scores = means({"student/retrieval/M": 12.5, "teacher/retrieval/M": 99.0})
    report: dict[str, Any] = {"scores": [asdict(score) for score in scores], "split": "val"}
    (run / "report.json").write_text(json.dumps(report | {"steps": 9, "samples": 36}))
    call(run, "open_clip", tmp_path / "out", "--licence", "apache-2.0")
    text = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert "| retrieval M | 12.50 |" in text
    assert "99.00" not in text
    assert "after 9 steps (36 samples). **The exported step is 7.**" in text
    kept = recipe_of(text)
    assert kept["backbone"]["image"]["mlp_ratio"] == 3.0
    assert "open_clip's tokenizer does the same" in text


def recipe_of(card: str) -> Any:
    return yaml.safe_load(card.split("## Recipe")[1].split("```yaml\n")[1].split("```")[0])


SECRET = "s3cr3t"


@pytest.mark.slow
def test_the_card_keeps_what_is_private(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """A token in a source's command, a folder of this machine, a tracker: none is published with the weights."""
    pytest.importorskip("transformers")
    pytest.importorskip("open_clip")
    run = make_run(
        f"data.source={{name: webdataset, urls: 'pipe:curl -H {SECRET} x.tar'}}",
        f"evaluate.source={{name: webdataset, urls: '/{SECRET}/b.tar', validation: '/{SECRET}/c.tar'}}",
        f"weights=[{{name: state_dict, source: '/{SECRET}/w.pt', to: backbone.image}}]",
        f"tracking={{name: aim, tags: [{SECRET}]}}",
    )
    call(run, "hf", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert SECRET not in text
    kept = recipe_of(text)
    assert kept["data"]["source"] == kept["evaluate"]["source"] == {"name": "webdataset"}
    assert kept["weights"] == [{"name": "state_dict"}]
    assert "tracking" not in kept
    assert public({"folder": f"/{SECRET}/minilm", "urls": ["a", 3]}) == {"folder": "minilm", "urls": ["a", 3]}


@pytest.mark.slow
def test_the_hf_card_says_what_its_tokenizer_leaves_to_the_user(run: Path, tmp_path: Path) -> None:
    """The advice in the card, followed, gives the run's ids; without it they are others."""
    transformers = pytest.importorskip("transformers")
    call(run, "hf", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "`html.unescape(html.unescape(ftfy.fix_text(text)))`" in card
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out")
    ours = distill_core.load(run)
    for text in ("it’s “fine”", "Tom &amp; Jerry"):
        assert text in card
        (ids,) = ours.collators["text"]([[ours.augment["text"].eval_view(text)]], [0]).groups[0].x[0].tolist()
        assert tokenizer(text)["input_ids"] != ids
        assert tokenizer(html.unescape(html.unescape(ftfy.fix_text(text))))["input_ids"] == ids
