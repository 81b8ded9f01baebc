"""Each check fails on a component that is broken in just the way it is for, and says what to fix."""

import importlib
import inspect
import os
import re
from collections import Counter
from pathlib import Path

import components_to_check.augmentation
import components_to_check.backbone
import components_to_check.fusion
import components_to_check.general
import components_to_check.head
import components_to_check.joint_augmentation
import components_to_check.loss
import components_to_check.masker
import components_to_check.others
import components_to_check.teacher
import pytest
from components_to_check.broken import BROKEN
from components_to_check.good import CASES
from components_to_check.good import GOOD as GOOD_OTHERS
from my_plugin.data import Waves
from my_plugin.fusion import MeanFusion
from my_plugin.loss import Match, MatchConfig
from my_plugin.tower import Tower
from my_plugin.views import Noisy

from distill_authoring.conformance import assert_conforms, check, checks_of, report
from distill_authoring.conformance.suite import Result
from distill_core.contracts.cases import ConformanceCase, ConformanceCases
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.kinds import INTERFACES
from distill_core.errors import UserError
from distill_core.interfaces import LossConfig
from distill_core.outputs import Encoded
from distill_core.registry import Plugins

GOOD = (
    *GOOD_OTHERS,
    components_to_check.teacher.Fixed,
    components_to_check.teacher.Average,
    components_to_check.masker.Window,
    components_to_check.masker.Attended,
    components_to_check.head.Speller,
)


@pytest.mark.slow
@pytest.mark.parametrize("component", GOOD, ids=lambda component: component.name)
def test_good_components_conform(component):
    """The control: what is broken below differs from these in one way. Would catch a check that is never content."""
    assert_conforms(component, CASES)


@pytest.mark.slow
def test_every_kind_has_a_good_component_and_most_checks_fit():
    """Would catch a check that passes because it is skipped everywhere."""
    assert {component.kind for component in GOOD} == set(INTERFACES)
    fitted = {
        (component.kind, r.check) for component in GOOD for r in check(component, cases=CASES) if r.status == "ok"
    }
    assert fitted == {(kind, one.name) for kind in INTERFACES for one in checks_of(kind)}


@pytest.mark.slow
@pytest.mark.parametrize(("component", "name", "message"), BROKEN)
def test_a_broken_component_fails_its_check(component, name, message):
    """Would catch a check that passes whatever it is given, or a message that does not say what is wrong."""
    (result,) = check(component, only=[name], cases=CASES)
    assert result.status == "failed", result
    assert re.search(message, result.message), result.message
    with pytest.raises(AssertionError, match=f"{component.kind} {re.escape(component.name)}: {name}: "):
        assert_conforms(component, CASES)


def test_each_check_has_a_broken_component():
    """Would catch a new check that nobody has seen fail."""
    seen = Counter((param.values[0].kind, param.values[1]) for param in BROKEN)
    general = {"documented", "options", "named", "needs_and_problems", "pickled_options"}
    wanted = {(kind, one.name) for kind in INTERFACES for one in checks_of(kind) if one.name not in general}
    assert wanted - set(seen) == set()
    assert general <= {name for _, name in seen}


def test_a_loss_may_bring_the_fusion_it_works_with():
    """Its case's fusion makes the fused features, from the tokens that it needs. Would catch leaves in their place."""

    class Own(MeanFusion):
        """Known by its class."""

        name = "own"

    class NeedsOwn(Match):
        """Works with one fusion alone."""

        def forward(self, outputs):
            if not isinstance(outputs.fusion, Own):
                raise UserError("needs the fusion 'own'")
            assert outputs.fused["left"].pooled.grad_fn is not None
            return super().forward(outputs)

        def units(self):
            return ()  # what raises is no graph

    (result,) = check(NeedsOwn, only=["terms"], cases=CASES)
    assert result.status == "failed"
    assert "needs the fusion 'own'" in result.message
    own = ConformanceCase(NeedsOwn, fusion=lambda config, plan: Own(ComponentConfig(), plan))
    assert {r.status for r in check(NeedsOwn, cases=ConformanceCases([own]))} == {"ok", "skipped"}


@pytest.mark.parametrize(("component", "name"), [(Noisy, "sample"), (Tower, "views")])
def test_a_component_without_a_case_is_told_which_hook_to_write(component, name):
    """Would catch a check that is skipped, or that ends in an error of Python."""
    failed = [result for result in check(component, cases=ConformanceCases([])) if result.status == "failed"]
    assert failed
    for result in failed:
        assert f"its plugin gives no `{name}` to check it with" in result.message
        assert f"ConformanceCase({component.__name__}, {name}=...) from the hook" in result.message


def test_a_component_that_no_plan_suits_is_told_so():
    """Would catch a component that passes because nothing could be built for it."""

    class Picky(Match):
        """Never content."""

        @classmethod
        def problems(cls, config, plan):
            yield "needs a width of 7"

    (result,) = check(Picky, only=["terms"], cases=CASES)
    assert result.status == "failed"
    assert "it accepts no plan: needs a width of 7" in result.message
    assert "`examples`" in result.message


def test_the_failing_example_is_named():
    class Two(Tower):
        """Works with the first example alone."""

        examples = (Tower.examples[0], {**Tower.examples[0], "dim": 9})

        def encode(self, x, *, tokens, token_mask):
            encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
            return Encoded(encoded.pooled[..., :8], encoded.tokens)

    (result,) = check(Two, only=["shapes"], cases=CASES)
    assert result.status == "failed"
    assert '"dim": 9' in result.message


def test_each_check_says_what_it_holds_a_component_to():
    assert all(inspect.cleandoc(one.about) for kind in INTERFACES for one in checks_of(kind))
    assert MatchConfig.model_fields["weight"].default == LossConfig().weight


def test_a_cause_is_printed_once_for_all_checks_that_it_concerns(capsys):
    """Catches a typo in `forward` that fills the screen, and one that is left out of another component."""
    typo, none = "NameError: name 'tokns' is not defined (loss.py:12)", "it reads no tokens"
    report.print_results(
        [
            Result(kind, "mine", name, "Holds.", status, message)
            for kind in ("loss", "fusion")
            for name, status, message in (
                ("terms", "failed", typo),
                ("named", "ok", ""),
                ("options", "ok", ""),
                ("padding", "failed", typo),
                ("masks", "skipped", none),
                ("pool", "skipped", none),
            )
        ]
    )
    loss, fusion = capsys.readouterr().out.split("fusion mine")
    for text in (loss, fusion):
        assert text.count(typo) == text.count(none) == text.count("requires: Holds.") == 1
        assert re.search(r"padding +FAILED  as terms\n", text)
        assert re.search(r"pool +-  as masks\n", text)
    assert "4 checks passed, 4 not applicable, 4 failed" in fusion


def test_a_plugin_that_ends_python_without_a_word(tmp_path, monkeypatch):
    """Would catch a check that needs an error message to tell of."""
    (tmp_path / "mute_plugin.py").write_text(f"import os\nif os.getpid() != {os.getpid()}: os._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins = Plugins()
    plugins.add("mute", importlib.import_module("mute_plugin"), "mute")
    (light,) = [result for result in report._plugin(plugins, "mute") if result.check == "light"]
    assert light.status == "failed"
    assert "exit code 7" in light.message


@pytest.mark.parametrize("given", ["", "/somewhere"])
def test_the_templates_cache_is_distills(given, tmp_path, monkeypatch):
    """An empty XDG_CACHE_HOME is none: would catch a source that writes into /distill."""
    monkeypatch.delenv("DISTILL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    expected = Path(given or tmp_path / ".cache") / "distill"
    assert Waves(Waves.Config())._path("train").is_relative_to(expected)
