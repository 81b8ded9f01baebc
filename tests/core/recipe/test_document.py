"""The YAML grammar of recipes: scalars, duplicate keys, where things were written, `--set`, `${NAME}`."""

import math

import pytest

from distill_core.errors import RecipeErrors
from distill_core.recipe.document import Document, read_document


def read(text: str) -> Document:
    return read_document(text, "r.yaml")


def refused(text: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        read(text)
    return caught.value.lines


def set_refused(document: Document, assignment: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        document.set(assignment)
    return caught.value.lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),  # PyYAML alone reads a string
        ("1e3", 1000),  # an int, so that an int option takes it
        ("1.5e3", 1500.0),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("012", 12),  # octal in YAML 1.1
        ("off", "off"),  # False in YAML 1.1
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2001-01-01", "2001-01-01"),  # a date in YAML 1.1
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("'12'", "12"),
        ('"null"', "null"),
        ("-.inf", -math.inf),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
    ],
)
def test_scalars(text: str, value: object) -> None:
    """Would catch YAML 1.1's surprises coming back; the type counts, since 1 == 1.0 == True."""
    found = read(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_one_value() -> None:
    assert math.isnan(read("a: .nan").data["a"])


def test_words_that_yaml_reads_as_other_things_are_keys_as_written() -> None:
    """Would catch `true:` or `1e3:` becoming another key than the one in the file."""
    assert read("true: 1\n1e3: 2\nnull: 3\n").data == {"true": 1, "1e3": 2, "null": 3}


def test_every_duplicate_key_is_named_with_both_lines() -> None:
    """PyYAML keeps the last without a word. Would catch that, and a report that stops at the first."""
    text = "a: 1\nb:\n  c: 1\n  d:\n    - {e: 1,\n       e: 2}\n  c: 3\na: 4\n"
    assert refused(text) == [
        "r.yaml:6: b.d.0.e: given twice, first in line 5; keep one",
        "r.yaml:7: b.c: given twice, first in line 3; keep one",
        "r.yaml:8: a: given twice, first in line 1; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1,\n", "r.yaml:3: not YAML: expected the node content, but found '<stream end>'"),
        ("a:\n\t- 3\n", "r.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not YAML: but found another document"),
        ("a: 1\nb: \x00\n", "r.yaml:2: not YAML: special characters are not allowed (#x0000)"),
        ("- a\n", "r.yaml:1: a recipe is a mapping of sections (augment, backbone, loss, ...)"),
        ("a: 1\n? [b, c]\n: 3\n", "r.yaml:2: a key must be a word"),
        ("a: &x [*x]\n", "r.yaml:1: an alias (*) is inside the value that it names"),
        ("a: 1\nb: !!binary aGk=\n", "r.yaml:2: b: tag:yaml.org,2002:binary is not a recipe's value"),
        (
            "a: 1\nb: {urls: ${CC3M}/x.tar}\n",
            "r.yaml:2: not YAML: expected ',' or '}', but got '{'; inside { } and [ ], write \"${NAME}\" in quotes",
        ),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(text: str, line: str) -> None:
    """Would catch a traceback of PyYAML's, or a recursion, for a file that is not a recipe."""
    assert refused(text) == [line]


def test_python_objects_are_refused() -> None:
    """Would catch a loader that builds objects from tags, or that passes over a tag without a word."""
    tag = "tag:yaml.org,2002:python/object/apply:os.getcwd"
    assert refused("a: !!python/object/apply:os.getcwd []\n") == [f"r.yaml:1: a: {tag} is not a recipe's value"]


def test_origins_are_lines_of_keys_and_items() -> None:
    """Would catch an error that points to the section in place of the option, or at a line counted from 0."""
    document = read("a:\n  b:\n    - x\n    - {c: 1,\n       d: 2}\n")
    assert document.origin(("a",)) == "r.yaml:1"
    assert document.origin(("a", "b", 0)) == "r.yaml:3"
    assert document.origin(("a", "b", 1, "d")) == "r.yaml:5"
    assert document.origin(("a", "b", 1, "new")) == "r.yaml:4", (
        "what is missing belongs to the place it is missing from"
    )
    assert document.origin(("z",)) == "r.yaml:1"


LOSSES = "loss:\n  - {name: one, id: first}\n  - {name: two}\n  - {name: two, id: again}\n  - {name: two, id: more}\n"


@pytest.mark.parametrize(("path", "index"), [("0", 0), ("first", 0), ("one", 0), ("again", 2), ("3", 3)])
def test_items_of_a_list_go_by_number_id_or_name(path: str, index: int) -> None:
    """Would catch a path that names the wrong item."""
    document = read(LOSSES)
    document.set(f"loss.{path}.weight=0.5")
    assert [item.get("weight") for item in document.data["loss"]] == [0.5 if i == index else None for i in range(4)]
    assert document.origin(("loss", index, "weight")) == f"--set loss.{path}.weight"


@pytest.mark.parametrize("path", ["two", "three", "-1", "9"])
def test_a_name_of_two_items_or_of_none_is_refused(path: str) -> None:
    """Would catch an override that silently takes the first of two, or the last for -1."""
    item = path if path == "9" else repr(path)
    assert set_refused(read(LOSSES), f"loss.{path}.weight=1") == [
        f"--set loss.{path}.weight: the list has no item {item}; it has 4, counted from 0"
    ]


def test_set_replaces_appends_and_removes() -> None:
    document = read("a: [1, 2]\nb: {c: 1}\n")
    document.set("a.0=5")
    document.set("a.2={name: x}")
    document.set("b.c=null")
    document.set("b.d = 1e3")
    assert document.data == {"a": [5, 2, {"name": "x"}], "b": {"c": None, "d": 1000}}


def test_set_makes_what_lies_on_the_way() -> None:
    """Would catch a list's item becoming the key '0' of a mapping, and errors that point at line 1 of the file."""
    document = read("a: null\n")
    document.set("a.b.c=1")
    document.set("tasks.0.name=x")
    document.set("tasks.1=y")
    assert document.data == {"a": {"b": {"c": 1}}, "tasks": [{"name": "x"}, "y"]}
    assert document.origin(("a", "b")) == "--set a.b.c"
    assert document.origin(("tasks", 0)) == "--set tasks.0.name"


def test_a_replaced_part_forgets_the_lines_below_it() -> None:
    """Would catch an error about `--set fusion=...` that blames a line of the file."""
    document = read("fusion:\n  name: x\n  heads: 3\n")
    document.set("fusion={name: y, heads: 4}")
    assert document.origin(("fusion", "heads")) == "--set fusion"


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("a.b", "--set a.b: write it as path=value, for example loss.1.weight=0.5"),
        ("=3", "--set =3: write it as path=value, for example loss.1.weight=0.5"),
        ("a.x=3", "--set a.x: a has no parts to set"),
        ("c.0=3", "--set c.0: c has no parts to set"),
        ("a=[", "--set a: not YAML: expected the node content, but found '<stream end>' in '['"),
        ("a={b: 1, b: 2}", "--set a: a.b: given twice, first in line 1; keep one in '{b: 1, b: 2}'"),
        ("a=!!binary aGk=", "--set a: tag:yaml.org,2002:binary is not a recipe's value in '!!binary aGk='"),
    ],
)
def test_bad_overrides_are_one_line(assignment: str, line: str) -> None:
    """Would catch overrides that are checked less than the file is."""
    assert set_refused(read("a: 1\nc: word\n"), assignment) == [line]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole value is YAML, so a number stays one; inside a longer text it is text; quoting does not matter."""
    monkeypatch.setenv("DISTILL_TEST_N", "12")
    monkeypatch.setenv("DISTILL_TEST_DIR", "/data: x")
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    document = read(
        "n: ${DISTILL_TEST_N}\nq: '${DISTILL_TEST_N}'\ntext: a-${DISTILL_TEST_N}-${DISTILL_TEST_N}.tar\n"
        "dir: ${DISTILL_TEST_DIR}\ndeep: [{x: '${DISTILL_TEST_UNSET}/y'}]\nplain: $HOME {0..3}\n"
        "${DISTILL_TEST_N}: key\n"
    )
    assert document.expand() == [(("deep", 0, "x"), "DISTILL_TEST_UNSET")]
    assert document.data == {
        "n": 12,
        "q": 12,
        "text": "a-12-12.tar",
        "dir": {"/data": "x"},
        "deep": [{"x": "${DISTILL_TEST_UNSET}/y"}],
        "plain": "$HOME {0..3}",
        "${DISTILL_TEST_N}": "key",
    }


def test_variables_are_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an environment that can name further variables."""
    monkeypatch.setenv("DISTILL_TEST_A", "${DISTILL_TEST_B}")
    monkeypatch.setenv("DISTILL_TEST_B", "reached")
    document = read("a: x${DISTILL_TEST_A}\n")
    assert document.expand() == []
    assert document.data == {"a": "x${DISTILL_TEST_B}"}


def test_an_override_can_hold_a_variable_and_hides_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expansion comes after overrides: would catch an unset variable that complains though --set gave a value."""
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    monkeypatch.setenv("DISTILL_TEST_N", "3")
    document = read("a: ${DISTILL_TEST_UNSET}\nb: 1\n")
    document.set("a=here")
    document.set("b=${DISTILL_TEST_N}")
    assert document.expand() == []
    assert document.data == {"a": "here", "b": 3}
