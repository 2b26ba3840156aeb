"""Every node has help, a picture and names in three languages."""

from __future__ import annotations

import json
import re

import pytest
from steadyvsr.tests.session.observed import ROOT

SCHEMAS = json.loads((ROOT / "tests" / "node_schemas.json").read_text(encoding="utf-8"))
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
LANGUAGES = ("en", "ja", "zh")


def page(name: str) -> str:
    return (DOCS / name / "en.md").read_text(encoding="utf-8")


def locale(language: str, file: str) -> dict:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def test_there_is_a_help_page_for_every_node_and_for_nothing_else():
    assert len(SCHEMAS) >= 15
    assert {folder.name for folder in DOCS.iterdir()} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_help_page_names_every_input_and_shows_the_node(name):
    text = page(name)
    assert text.startswith(f"# {SCHEMAS[name]['display_name']}\n")
    missing = [i["id"] for i in SCHEMAS[name]["inputs"] if i["id"] not in text and not i["id"].startswith("model_")]
    assert missing == []
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert (DOCS / name / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_help_page_explains_an_input_that_is_not_there(name):
    table = page(name).partition("| input | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([a-z][a-z_0-9]*) \|", table, re.MULTILINE)
    assert len(rows) >= len(SCHEMAS[name]["inputs"]) - 4
    assert set(rows) <= {item["id"] for item in SCHEMAS[name]["inputs"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_names_every_node_input_and_output_and_none_beside(language):
    nodes = locale(language, "nodeDefs")
    assert set(nodes) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert nodes[name]["display_name"]
        assert set(nodes[name]["inputs"]) == {item["id"] for item in schema["inputs"]}
        assert set(nodes[name]["outputs"]) == {str(index) for index in range(len(schema["outputs"]))}


@pytest.mark.parametrize(("language", "words"), [("en", "dynamic VRAM"), ("ja", "動的 VRAM"), ("zh", "动态显存")])
def test_a_language_says_where_pin_cannot_be_promised(language, words):
    nodes = locale(language, "nodeDefs")
    pins = [name for name, item in SCHEMAS.items() if "dynamic VRAM" in json.dumps(item)]
    assert len(pins) == 5
    assert all(words in nodes[name]["inputs"]["keep_loaded"].get("tooltip", "") for name in pins)


def test_english_is_what_the_schema_says():
    english = locale("en", "nodeDefs")
    for name, schema in SCHEMAS.items():
        assert english[name]["description"] == schema["description"]
        assert {i: x["tooltip"] for i, x in english[name]["inputs"].items()} == {
            item["id"]: item["tooltip"] for item in schema["inputs"]
        }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("file", "pattern"),
    [("settings", r'id: "(SteadyVSR\.\w+)", key'), ("commands", r'id: "(SteadyVSR\.\w+)", label')],
)
def test_a_language_names_every_setting_and_command(language, file, pattern):
    declared = re.findall(pattern, (ROOT / "web" / "steadyvsr.js").read_text(encoding="utf-8"))
    assert len(declared) >= 3
    assert set(locale(language, file)) == {name.replace(".", "_") for name in declared}
