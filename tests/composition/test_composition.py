"""The task `composition` and the layouts of published sets, with answers worked out by hand."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_values import values
from torch import Tensor
from torch.nn.functional import normalize

from distill_authoring.conformance import assert_conforms
from distill_composition.layouts import MmvpVlm, SugarCrepe, SvoProbes, Winoground
from distill_composition.task import Composition, CompositionConfig, accuracies, matched
from distill_core.contracts.source import DataSource
from distill_core.errors import DataError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_vl.captions import CaptionConfig
from distill_vl.example import Whole, Words
from distill_vl.pictures import PictureConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "pink": (255, 0, 128), "black": (0, 0, 0)}


class SeesColours:
    """A picture's embedding is the colour of its first pixel, a text's that of the first colour it names."""

    modalities = ("image", "text")
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.augment = {"image": Whole(PictureConfig()), "text": Words(CaptionConfig())}

    def encode(self, modality: str, items: Iterable[Any], *, features: str = "embedding") -> Tensor:
        if modality == "image":
            found = [item.getpixel((0, 0)) for item in items]
        else:
            found = [next(COLOURS[w] for w in re.findall("[a-z]+", text) if w in COLOURS) for text in items]
        return normalize(torch.tensor(found, dtype=torch.float32).reshape(-1, 3), dim=-1)


def png(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), COLOURS[name]).save(file, "PNG")
    return file.getvalue()


def run(source: DataSource, **options: Any) -> tuple[dict[str, float], list[EvaluationSet]]:
    sets = [EvaluationSet(name, samples) for name, samples in source.samples("test").items()]
    return values(Composition(CompositionConfig(**options)).run(SeesColours(), sets)), sets  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("component", [Composition, SugarCrepe, Winoground, SvoProbes, MmvpVlm])
def test_conforms(component: Any) -> None:
    assert_conforms(component)


def test_winoground_scores_by_hand() -> None:
    """Rows are pictures, columns captions: all right; text alone; image alone; a tie; a NaN."""
    similarity = torch.tensor(
        [
            [[0.9, 0.1], [0.2, 0.8]],
            [[0.3, 0.1], [0.5, 0.6]],  # caption 0 is nearer to picture 1
            [[0.3, 0.4], [0.1, 0.5]],  # picture 0 is nearer to caption 1
            [[0.5, 0.5], [0.1, 0.6]],
            [[0.9, float("nan")], [0.2, 0.8]],
        ]
    )
    hits = accuracies(similarity)
    assert hits["text"].tolist() == [True, True, False, False, False]
    assert hits["image"].tolist() == [True, False, True, True, False]
    assert hits["group"].tolist() == [True, False, False, False, False]
    public = [  # as the authors' functions say it, pair by pair
        (s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0], s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]) for s in similarity
    ]
    assert [(bool(a), bool(b)) for a, b in public] == list(
        zip(hits["text"].tolist(), hits["image"].tolist(), strict=True)
    )


def test_one_picture_or_one_caption() -> None:
    """SugarCrepe has no image score, SVO-Probes no text score; with neither side doubled there is none."""
    one_picture = torch.tensor([[[0.5, 0.4]], [[0.4, 0.5]], [[0.4, 0.4]]])
    assert {name: hit.tolist() for name, hit in accuracies(one_picture).items()} == {"text": [True, False, False]}
    assert {name: hit.tolist() for name, hit in accuracies(one_picture.mT).items()} == {"image": [True, False, False]}
    three = torch.tensor([[[0.5, 0.4, 0.6]], [[0.5, 0.4, 0.3]]])
    assert accuracies(three)["text"].tolist() == [False, True]


def test_the_published_match_of_svo_probes() -> None:
    """Threshold .5: own pictures 2 of 3 above it; others, where the same pair comes twice and counts once, 1 of 2."""
    similarity = torch.tensor([[[0.9], [0.6]], [[0.8], [0.6]], [[0.5], [0.5]]])
    pairs = [[[b"a"], [b"x"]], [[b"b"], [b"x"]], [[b"c"], [b"y"]]]
    assert matched(similarity, pairs, 0.5) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_sugarcrepe(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png(name))
    swap = {
        "0": {"filename": "red.png", "caption": "a red one", "negative_caption": "a blue one"},
        "1": {"filename": "blue.png", "caption": "a red one", "negative_caption": "a blue one"},
        "7": {"filename": "blue.png", "caption": "a blue one", "negative_caption": "a blue two"},  # a tie
        "8": {"filename": "red.png", "caption": "a pink one", "negative_caption": "a green one"},
    }
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "swap_obj.json").write_text(json.dumps(swap))
    (folder / "add_att.json").write_text(json.dumps({"0": swap["0"]}))
    source = SugarCrepe.Config.model_validate({"annotations": str(folder), "images": str(tmp_path)})
    scores, sets = run(SugarCrepe(source))
    assert [here.name for here in sets] == ["add_att", "swap_obj"]
    assert scores == {
        "add_att/samples": 1, "add_att/text": 100, "swap_obj/samples": 4, "swap_obj/text": 50, "text": 75,
    }  # fmt: skip
    one = SugarCrepe.Config.model_validate({"annotations": str(folder / "add_att.json"), "images": str(tmp_path)})
    assert run(SugarCrepe(one))[0]["text"] == 100


def test_winoground(tmp_path: Path) -> None:
    """The first is right; in the second both captions are the same to the model: ties."""
    (tmp_path / "images").mkdir()
    for name in ("red", "blue"):
        (tmp_path / f"images/ex_{name}.png").write_bytes(png(name))
    both = {"image_0": "ex_red", "image_1": "ex_blue.png"}
    lines = [
        {"id": 0, **both, "caption_0": "red not blue", "caption_1": "blue not red", "collapsed_tag": "Object"},
        {"id": 1, **both, "caption_0": "red", "caption_1": "red again", "collapsed_tag": "Relation"},
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    scores, _ = run(Winoground(Winoground.Config(root=str(tmp_path))))
    assert {name: scores[name] for name in ("text", "image", "group")} == {"text": 50, "image": 50, "group": 50}
    scores, _ = run(Winoground(Winoground.Config(root=str(tmp_path), by_tag=True)))
    assert (scores["Object/group"], scores["Relation/group"], scores["group"]) == (100, 0, 50)


def test_svo_probes(tmp_path: Path) -> None:
    """Rows that differ in two words are left out, and so is one whose picture could not be fetched, by name."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("red", "blue", "pink")):
        (tmp_path / f"images/{number}.png").write_bytes(png(name))
    (tmp_path / "svo_probes.csv").write_text(
        "sentence,pos_triplet,neg_triplet,pos_url,neg_url,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"
        '"a red, old thing","a,b,c","d,b,c",u,v,0,1,True,False,False\n'
        "a red thing,t,t,u,v,1,0,True,False,False\n"
        "a red thing,t,t,u,v,2,1,False,True,False\n"
        "a red thing,t,t,u,v,0,9,False,True,False\n"
        "a red thing,t,t,u,v,0,1,False,True,True\n"
    )
    config = SvoProbes.Config(annotations=str(tmp_path / "svo_probes.csv"), images=str(tmp_path / "images"))
    scores, sets = run(SvoProbes(config), threshold=0.95)
    assert scores["subject/image"] == 50
    assert scores["verb/image"] == 100
    assert (scores["subject/samples"], scores["verb/samples"]) == (2, 1)
    assert scores["subject/match"] == 50  # own: red .. red is, red .. blue is not; others likewise
    assert scores["verb/match"] == 50  # red .. pink: .89
    assert not any(name.endswith("text") for name in scores)
    (skipped,) = sets[1].skipped.values()
    assert (skipped.key, skipped.url) == ("svo-5", f"{tmp_path}/images/0.png, {tmp_path}/images/9.jpg (missing)")
    assert skipped.reason == "image: no picture: none of the fields image_1"


def test_mmvp_vlm(tmp_path: Path) -> None:
    """A pair counts when both statements choose their picture; the accuracy is by pattern."""
    for kind, names in {"Color": ("red", "blue"), "Text": ("pink", "red")}.items():
        folder = tmp_path / "MLLM_VLM Images" / kind
        folder.mkdir(parents=True)
        for number, name in enumerate(names, 1 if kind == "Color" else 3):
            Image.new("RGB", (8, 8), COLOURS[name]).save(folder / f"{number}.jpg", quality=100)
    (tmp_path / "Questions.csv").write_text(
        'Question ID,Type,Statement\n1,Color,a red thing\n2,Color,"blue, not red"\n3,Text,red\n4,Text,red\n'
    )
    scores, sets = run(MmvpVlm(MmvpVlm.Config(root=str(tmp_path))))
    assert (scores["Color/image"], scores["Text/image"], scores["image"]) == (100, 0, 50)
    (sample,) = sets[0]
    assert json.loads(sample["json"])["caption_1"] == "a photo of blue, not red"


def test_what_is_wrong_with_a_copy(tmp_path: Path) -> None:
    def said(source: type[DataSource], **options: str) -> str:
        with pytest.raises(DataError) as caught:
            source(source.Config(**options)).samples("test")  # type: ignore[call-arg]
        return str(caught.value).replace(str(tmp_path), "ROOT")

    here = str(tmp_path)
    assert said(SugarCrepe, annotations=here, images=here) == "ROOT: no file *.json"
    (tmp_path / "a.json").write_text('{"3": {"filename": "x.jpg", "caption": "red"}}')
    assert said(SugarCrepe, annotations=here, images=here) == "ROOT/a.json: '3': no picture 'x.jpg' in ROOT"
    (tmp_path / "x.jpg").write_bytes(png("red"))
    assert said(SugarCrepe, annotations=here, images=here) == "ROOT/a.json: '3': no text in 'negative_caption'"
    (tmp_path / "a.json").write_text("[]")
    assert said(SugarCrepe, annotations=here, images=here) == "ROOT/a.json: should be an object of entries by number"
    assert said(Winoground, root=here) == "ROOT/images: no such folder; expected examples.jsonl and images in `root`"
    (tmp_path / "images").mkdir()
    assert said(Winoground, root=here).startswith("ROOT/examples.jsonl: cannot be read")
    (tmp_path / "examples.jsonl").write_text('\n{"image_0": "nowhere"}\n')
    assert said(Winoground, root=here) == "ROOT/examples.jsonl:2: no picture 'nowhere' in ROOT/images"
    (tmp_path / "svo.csv").write_text("sentence,pos_image_id\n")
    assert said(SvoProbes, annotations=f"{here}/svo.csv", images=here) == (
        "ROOT/svo.csv: the first line lacks the column(s) neg_image_id, obj_neg, subj_neg, verb_neg"
    )
    (tmp_path / "MLLM_VLM Images").mkdir()
    (tmp_path / "Questions.csv").write_text("Question ID,Type,Statement\n2,Color,red\n3,Color,blue\n")
    assert said(MmvpVlm, root=here) == "ROOT/Questions.csv:2: 2 and 3 are no pair: an odd id and the next"
    (tmp_path / "Questions.csv").write_text("Question ID,Type,Statement\nred\n")
    assert said(MmvpVlm, root=here) == "ROOT/Questions.csv:2: 1 column(s), where the first line has 3"
    for number in ("\u00b2", "1" * 5000, "-1"):
        (tmp_path / "Questions.csv").write_text(f"\nQuestion ID,Type,Statement\n\n{number},Color,red\n", "utf-8")
        assert said(MmvpVlm, root=here).startswith("ROOT/Questions.csv:4: should be ID,TYPE,STATEMENT, got '")
    (tmp_path / "Questions.csv").write_text("\n \n")
    assert said(MmvpVlm, root=here) == "ROOT/Questions.csv: no entry in it"


HEAD = "sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('"red,0,1,True,False,False', "not a row of a csv: "),
        ('"red" one,0,1,True,False,False', "not a row of a csv: "),
        ("red, blue,0,1,True,False,False", "7 column(s), where the first line has 6"),
        ("red,0,1,True,False", "5 column(s), where the first line has 6"),
        ('"red\none",0,1,True,False,False', "not a row of a csv: "),
    ],
)
def test_rows_that_are_broken(tmp_path: Path, line: str, reason: str) -> None:
    """Would catch a quote that swallows the rows after it, and an error without its line."""
    good = "red,0,1,True,False,False\n"
    file = tmp_path / "svo.csv"
    (tmp_path / "0.png").write_bytes(png("red"))
    config = SvoProbes.Config(annotations=str(file), images=str(tmp_path))
    file.write_text(HEAD + "\n" + good + f"{line}\n" + good * 50 + '"blue",0,1,True,False,False\n')
    with pytest.raises(DataError) as caught:
        SvoProbes(config).samples("test")
    assert str(caught.value).startswith(f"{file}:4: {reason}")
    file.write_bytes((HEAD + good).replace("\n", "\r\n").encode())
    (sample,) = SvoProbes(config).samples("test")["subject"]
    assert json.loads(sample["json"]) == {"caption_0": "red"}


@pytest.mark.parametrize("name", ["/etc/hosts", "../out.png", "a/../../out.png", "out\0.png", "n" * 5000])
def test_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    """A copy names no file outside the folder of pictures, and none that the system refuses."""
    (tmp_path / "out.png").write_bytes(png("red"))
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "0.png").write_bytes(png("red"))
    captions = {"caption": "red", "negative_caption": "blue", "caption_0": "red", "caption_1": "blue"}
    entry = {"filename": name, "image_0": name, "image_1": name, **captions}
    (tmp_path / "add.json").write_text(json.dumps({"0": entry}))
    (tmp_path / "examples.jsonl").write_text(json.dumps(entry))
    refused = "no picture" if name[0] == "n" else "is not a path inside"
    sugarcrepe = SugarCrepe.Config.model_validate({"annotations": str(tmp_path / "add.json"), "images": str(images)})
    for source, line in ((SugarCrepe(sugarcrepe), ": '0'"), (Winoground(Winoground.Config(root=str(tmp_path))), ":1")):
        with pytest.raises(DataError, match=refused) as caught:
            source.samples("test")
        assert f"{line}: " in str(caught.value)
    if name[0] == "n":
        return
    (tmp_path / "svo.csv").write_text(f"{HEAD}red,0,{name},True,False,False\n")
    svo = SvoProbes.Config(annotations=str(tmp_path / "svo.csv"), images=str(images))
    with pytest.raises(DataError, match=r"svo\.csv:2: .* is not a path inside"):
        SvoProbes(svo).samples("test")


def test_a_caption_may_hold_other_line_breaks(tmp_path: Path) -> None:
    """U+2028 stands as it is in json, and ends no line."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/red.png").write_bytes(png("red"))
    entry = {"image_0": "red", "image_1": "red", "caption_0": "red\u2028one", "caption_1": "blue\x85one"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", "utf-8")
    (sample,) = Winoground(Winoground.Config(root=str(tmp_path))).samples("test")["winoground"]
    assert json.loads(sample["json"])["caption_0"] == "red\u2028one"


def test_what_the_task_refuses() -> None:
    def said(*samples: dict[str, Any]) -> str:
        given = [{"__key__": str(i), "__url__": "here", **fields} for i, fields in enumerate(samples)]
        with pytest.raises(DataError) as caught:
            Composition(CompositionConfig()).run(SeesColours(), [EvaluationSet("set", given)])  # type: ignore[arg-type]
        return str(caught.value)

    assert said() == "evaluation set 'set': no sample"
    alone = {"image_0": png("red"), "json": b'{"caption_0": "red"}'}
    assert "nothing to tell apart: its samples have the pictures image_0 and the captions caption_0" in said(alone)
    several = {"image_0": png("red"), "json": json.dumps({"caption_0": ["red", "blue"], "caption_1": "blue"}).encode()}
    assert said(several) == "evaluation set 'set': 'caption_0' holds several items in one sample"
    blind = {"image_0": b"", "json": json.dumps({"caption_0": "red", "caption_1": "blue"}).encode()}
    assert said(blind) == "evaluation set 'set': no sample with all of image_0, caption_0, caption_1"
    plan = Plan({"image": ModalityPlan(("global",), BackboneSpec(8, 8))})
    assert list(Composition.problems(CompositionConfig(), plan)) == [
        "'composition' compares two modalities; the recipe has 'image' alone"
    ]


@pytest.mark.parametrize("lacking", ["image_0", "image_1", "caption_0", "caption_1"])
def test_the_first_sample_lacks_a_field(lacking: str) -> None:
    """It is left out and the others keep their pairs: would catch picture 1 compared with caption 0."""
    samples = []
    for i in range(10):
        pictures = {"image_0": png("red"), "image_1": png("blue")}
        captions = {"caption_0": "red", "caption_1": "blue"}
        if not i:
            pictures.pop(lacking, None)
            captions.pop(lacking, None)
        samples.append({"__key__": str(i), "__url__": "here", "json": json.dumps(captions).encode(), **pictures})
    here = EvaluationSet("set", samples)
    scores = values(Composition(CompositionConfig()).run(SeesColours(), [here]))  # type: ignore[arg-type]
    assert (scores["text"], scores["image"], scores["group"], scores["set/samples"]) == (100, 100, 100, 9)
    (skipped,) = here.skipped.values()
    assert (skipped.key, lacking in skipped.reason) == ("0", True)


def test_fields_end_where_a_pair_would_be_broken() -> None:
    """No sample has `image_0`: `image_1` alone is no picture of caption 0."""
    captions = {"caption_0": "red", "caption_1": "blue"}
    sample = {"__key__": "a", "__url__": "here", "json": json.dumps(captions).encode(), "image_1": png("blue")}
    with pytest.raises(DataError, match=r"have the pictures \(none\) and the captions caption_0, caption_1"):
        Composition(CompositionConfig()).run(SeesColours(), [EvaluationSet("set", [sample])])  # type: ignore[arg-type]


def test_swapped_sentences_of_emoji_scenes(tmp_path: Path) -> None:
    """A model that reads what the scene's sentences say and one that reads the wrong one: 100 and 0."""
    from distill_emoji.scenes import EmojiScenes, ScenesConfig

    emoji = {"limit": 120, "shards": 1, "size": 16, "styles": ("openmoji",), "cache": str(tmp_path)}
    source = EmojiScenes(ScenesConfig.model_validate({"scenes": 3, "concepts": 5, "size": 32, "emoji": emoji}))
    source.prepare()
    samples = list(source.samples("validation")["openmoji"])
    right = [json.loads(sample["json"])["caption_0"] for sample in samples]

    class Reads(SeesColours):
        sign = 1.0

        def encode(self, modality: str, items: Iterable[Any], *, features: str = "embedding") -> Tensor:
            signs = [1.0 if modality == "image" or item in right else -1.0 for item in items]
            return torch.tensor(signs)[:, None] * (self.sign if modality == "image" else 1.0)

    model = Reads()
    here = EvaluationSet("scenes", samples)
    assert values(Composition(CompositionConfig()).run(model, [here]))["text"] == 100  # type: ignore[arg-type]
    other = Reads()
    other.sign = -1.0
    assert values(Composition(CompositionConfig()).run(other, [EvaluationSet("scenes", samples)]))["text"] == 0  # type: ignore[arg-type]
    assert np.all([len(json.loads(sample["json"])["captions"]) >= 2 for sample in samples])
