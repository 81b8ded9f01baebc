"""Hugging Face text encoders as backbones: against the library's own pooling, and real weights."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill_core.batch import View
from distill_core.errors import RecipeErrors, UserError
from distill_core.outputs import Features
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.system.extras import install
from distill_pretrained import folders
from distill_pretrained.hf_text import PAD, HfText, HfTextConfig

hf: Any = pytest.importorskip("transformers")

TEXTS = ["a red bird", "boat", "the old red bird by the sea"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "old", "bird", "boat", "by", "the", "sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a vocabulary of words."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=20)  # fmt: skip
    hf.BertModel(config).save_pretrained(path)
    hf.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(path)
    return path


def encode(config: HfTextConfig, texts: list[str]) -> tuple[HfText, Features]:
    module = HfText(config).eval()
    views = HfText.collator(config)([[View(text)] for text in texts], [0] * len(texts))
    with torch.no_grad():
        features: Features = module(views, tokens_of=(0,))
    return module, features


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(folder: Path, pooling: Any) -> None:
    """Each text alone, without padding, through the library."""
    module, features = encode(HfTextConfig(folder=str(folder), pooling=pooling, context=16, dim=6), TEXTS)
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), hf.AutoModel.from_pretrained(folder).eval()
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(features.pooled[0, i], pooled @ module.proj.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.tokens[0][i][features.masks[0][i]], hidden, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_and_padded(folder: Path) -> None:
    config = HfTextConfig(folder=str(folder), context=5, dim=6)
    views = HfText.collator(config)([[View(TEXTS[2])], [View("boat")]], [0, 0])
    assert views.groups[0].x.tolist() == [[[2, 11, 7, 6, 3], [2, 9, 3, PAD, PAD]]]


def test_the_package_brings_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like meanings are near, before any training; unpacked once, into the cache."""
    pytest.importorskip("all_minilm_l6_v2")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    texts = ["a dog runs over the grass", "a puppy is running in a meadow", "the central bank raised interest rates"]
    _, features = encode(HfTextConfig(package="all_minilm_l6_v2"), texts)
    assert features.class_tokens is not None
    unit = torch.nn.functional.normalize(features.class_tokens[0, :, 0], dim=-1)
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.2
    (home,) = (tmp_path / "packages").iterdir()
    assert (home / "model.safetensors").is_file()
    before = home.stat().st_mtime_ns
    assert folders.locate(None, "all_minilm_l6_v2") == home
    assert home.stat().st_mtime_ns == before


@pytest.mark.slow
def test_mistakes(folder: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("recipes/pretrained/lit_minilm_tiny.yaml").read_text()
    old = "{name: hf_text, package: all_minilm_l6_v2, context: 64, dim: 128}"
    assert old in text

    def refused(options: str) -> str:
        with pytest.raises(RecipeErrors) as caught:
            parse_recipe(text.replace(old, f"{{name: hf_text, dim: 128, {options}}}"), "r.yaml", registry=registry)
        return str(caught.value)

    assert "r.yaml:18: backbone.text: context 64 is more than the model's 20" in refused(
        f"folder: '{folder}', context: 64"
    )
    assert "r.yaml:18: backbone.text: hf_text: /nowhere: no readable config.json" in refused("folder: /nowhere")
    assert "give either `folder` or `package`" in refused("context: 64")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "find_spec", lambda name: None)
        assert install("minilm") in refused("package: all_minilm_l6_v2")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing_known"}))
    assert "transformers has no model_type 'nothing_known'" in refused(f"folder: '{tmp_path}'")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert "a model of type 'clip' has no hidden_size; take the folder of a text encoder" in refused(
        f"folder: '{tmp_path}'"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "wide"}))
    assert "config.json is not one of a bert: " in refused(f"folder: '{tmp_path}'")
    # weights as a pickle are not read
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        HfText(HfTextConfig(folder=str(tmp_path)))


def test_weights_that_are_missing_are_not_drawn(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library starts what a file lacks at random, and goes on; a pooler may be missing, as it is not read."""
    model = hf.BertModel.from_pretrained(folder)
    state = model.state_dict()
    shutil.copytree(folder, tmp_path / "whole")
    save = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    save_file(save, tmp_path / "whole/model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    HfText(HfTextConfig(folder=str(tmp_path / "whole"), dim=6))
    assert capfd.readouterr() == ("", "")
    del save["encoder.layer.1.output.dense.weight"]
    save_file(save, tmp_path / "whole/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of a BertModel, as encoder\.layer\.1\.output\.dense\.weight"):
        HfText(HfTextConfig(folder=str(tmp_path / "whole")))
    assert capfd.readouterr() == ("", "")


def test_positions_that_begin_behind_padding(tmp_path: Path, registry: Registry) -> None:
    """RoBERTa's first position is pad_token_id + 1: of 20 there are 18 for tokens, and the model takes no 19th."""
    config = hf.RobertaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=32, max_position_embeddings=20, pad_token_id=1)  # fmt: skip
    hf.RobertaModel(config).save_pretrained(tmp_path)
    text = Path("recipes/pretrained/lit_minilm_tiny.yaml").read_text()
    plan = parse_recipe(text, "r.yaml", registry=registry).plan
    for context, problems in ((18, []), (19, ["context 19 is more than the model's 18 positions"])):
        options = HfTextConfig(folder=str(tmp_path), context=context, dim=6)
        assert list(HfText.problems(options, plan)) == problems
        ids = torch.full((1, context), 7)
        with pytest.raises((IndexError, RuntimeError)) if problems else nullcontext(), torch.no_grad():
            assert HfText(options).eval().encode(ids, tokens=False, token_mask=None).pooled.isfinite().all()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_without_tokens_is_finite(folder: Path, pooling: Any) -> None:
    """As tokenizers without special tokens make of an empty text; its neighbour is as it was."""
    module = HfText(HfTextConfig(folder=str(folder), pooling=pooling, dim=6)).eval()
    ids = torch.tensor([[PAD, PAD, PAD], [2, 9, 3]])
    with torch.no_grad():
        pooled = module.encode(ids, tokens=False, token_mask=None).pooled
        alone = module.encode(ids[1:], tokens=False, token_mask=None).pooled
    assert pooled.isfinite().all()
    torch.testing.assert_close(pooled[1:], alone, rtol=1e-4, atol=1e-5)
