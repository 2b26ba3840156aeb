"""The schemas of all nodes are those that were committed, on the double of ComfyUI and in each real one."""

from __future__ import annotations

import json

import pytest
from steadyvsr.tests.session.observed import ROOT, scenario

SUBJECT = "schema"
SCHEMAS = json.loads((ROOT / "tests" / "node_schemas.json").read_text(encoding="utf-8"))


def test_the_schemas_are_what_was_committed(observed):
    """Ids and types of inputs and outputs are kept forever: workflows are saved with them."""
    assert scenario(observed, "schema all nodes") == SCHEMAS


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_ids_of_the_inputs_are_the_parameters_of_execute(observed, name):
    inputs, parameters = scenario(observed, "schema parameters")[name]
    assert sorted(inputs) == sorted(parameters)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_input_and_output_has_a_tooltip_and_every_node_its_place(observed, name):
    schema = scenario(observed, "schema all nodes")[name]
    assert [item["id"] for item in [*schema["inputs"], *schema["outputs"]] if not item["tooltip"]] == []
    assert schema["category"].startswith("SteadyVSR/") and schema["description"]
