"""The example workflows: whole as files, known to both versions of ComfyUI, and two of them run to their video."""

from __future__ import annotations

import json

import av
import pytest
from steadyvsr.tests.comfy.server import CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH, ROOT
from steadyvsr.tests.comfy.workflow_files import ONLY_IN_THE_FRONT_END, api_form

FOLDER = ROOT / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))
SCHEMAS = json.loads((ROOT / "tests" / "node_schemas.json").read_text())
THUMBNAIL_BYTES = 60_000
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
STOCK = {
    "CLIPTextEncode", "GetVideoComponents", "ImageFromBatch", "ImageScale", "KSampler", "LoadVideo", "ModelSamplingSD3",
    "PreviewImage", "SaveVideo", "VAEDecode", "VAEEncode", "CreateVideo",
}  # fmt: skip

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def test_the_examples_are_the_four_that_the_readme_names():
    assert [path.stem for path in EXAMPLES] == [
        "keep_two_models_and_free", "long_video_streamed", "quick_upscale_video", "seven_phases_with_gates",
    ]  # fmt: skip


@every_example
def test_every_node_is_one_of_the_pack_or_a_named_stock_node_and_a_note_says_what_to_do(path):
    types = {node["type"] for node in json.loads(path.read_text())["nodes"]}
    assert types - SCHEMAS.keys() - ONLY_IN_THE_FRONT_END <= STOCK
    assert types & ONLY_IN_THE_FRONT_END and types & SCHEMAS.keys()


@every_example
def test_every_node_of_the_pack_has_a_value_for_each_of_its_widgets(path):
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] not in SCHEMAS:
            continue
        widgets = [item for item in SCHEMAS[node["type"]]["inputs"] if item["type"] in WIDGETS]
        # The front end saves what becomes of a seed after each run as a value of its own behind it.
        expected = len(widgets) + sum(item["id"] == "seed" for item in widgets)
        assert len(node["widgets_values"]) == expected, node["type"]
        names = [item["name"] for item in node["inputs"]]
        assert set(names) <= {item["id"] for item in SCHEMAS[node["type"]]["inputs"]}


@every_example
def test_every_link_is_known_at_both_of_its_ends(path):
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert max(links) == workflow["last_link_id"]
    for id, origin, out, target, slot, _ in workflow["links"]:
        assert id in nodes[origin]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == id
    assert {item["link"] for node in nodes.values() for item in node["inputs"]} - {None} == links.keys()
    assert sorted(id for node in nodes.values() for item in node["outputs"] for id in item["links"]) == sorted(links)


@every_example
def test_every_example_has_a_small_thumbnail(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.read_bytes().startswith(b"\xff\xd8") and thumbnail.stat().st_size <= THUMBNAIL_BYTES


@pytest.mark.comfy
@every_example
def test_comfyui_knows_every_node_input_and_choice_of_the_example(server, path):
    known = server.get("/object_info")
    prompt = api_form(json.loads(path.read_text()), known)
    for node in prompt.values():
        declared = known[node["class_type"]]["input"]
        inputs = {**declared["required"], **declared.get("optional", {})}
        assert declared["required"].keys() <= node["inputs"].keys()
        for name, value in node["inputs"].items():
            kind, *more = inputs[name.partition(".")[0]]
            choices = kind if isinstance(kind, list) else (more[0] if more else {}).get("options", [])
            from_files = name == "file" or name.endswith(("_name", "_name1", "_name2", "_name3", "_name4"))
            if choices and "." not in name and not from_files and not isinstance(value, list):
                keys = [choice["key"] if isinstance(choice, dict) else choice for choice in choices]
                assert value in keys, (node["class_type"], name, value)


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["quick_upscale_video", "long_video_streamed"])
def test_a_clip_goes_through_the_example_as_it_stands_and_comes_out_four_times_as_large(server, name):
    prompt = api_form(json.loads((FOLDER / f"{name}.json").read_text()), server.get("/object_info"))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (save,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "SaveVideo"]
    folder, _, prefix = save["filename_prefix"].rpartition("/")
    (result,) = (server.log.parent / "output" / folder).glob(f"{prefix}_0*.mp4")
    with av.open(str(result)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == CLIP_FRAMES
    assert (frames[0].width, frames[0].height) == (4 * CLIP_WIDTH, 4 * CLIP_HEIGHT)
