"""The shipped tables of known releases themselves, not planted ones: their form, and what they lack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from steadyvsr.models.flashvsr.checkpoint.download import PROMPT, WEIGHTS
from steadyvsr.models.flashvsr.checkpoint.load import load_flashvsr
from steadyvsr.models.flashvsr.checkpoint.parts import KNOWN_PROJECTIONS, VERSIONS
from steadyvsr.models.known_files import KNOWN_FILES
from steadyvsr.models.weight_file import CheckpointError
from steadyvsr.tests.models.checkpoint_files import random_parts, write_folder

MANIFESTS = Path(__file__).resolve().parents[1] / "data" / "manifests"
SHA256 = re.compile(r"[0-9a-f]{64}")


def test_a_hash_is_a_sha256_and_stands_for_one_file():
    digests = [known.sha256 for known in KNOWN_FILES] + list(KNOWN_PROJECTIONS)
    assert all(SHA256.fullmatch(digest) for digest in digests)
    assert len(set(digests)) == len(digests) >= 6


def test_a_version_is_a_known_one_or_none_where_the_releases_share_the_file():
    assert {known.version for known in KNOWN_FILES} == {"v1.1", None}
    assert set(KNOWN_PROJECTIONS.values()) <= set(VERSIONS)


def test_every_official_file_of_v1_1_is_known_with_its_size():
    names = " ".join(known.name for known in KNOWN_FILES if known.size_slack_bytes == 0)
    assert all(name in names for name in (*WEIGHTS, PROMPT))


@pytest.mark.parametrize(
    ("part", "name", "itemsize"),
    [("dit", WEIGHTS[0], 4), ("lq", "LQ_proj_in.ckpt", 2), ("vae", "Wan2.1_VAE.pth", 4)],
)
def test_a_known_size_is_that_of_the_released_tensors_and_a_little_around_them(part, name, itemsize):
    parameters = json.loads((MANIFESTS / "SUMMARY.json").read_text(encoding="utf-8"))[part]["params"]
    (size,) = (known.size_bytes for known in KNOWN_FILES if known.name.endswith(name))
    assert 0 < size - itemsize * parameters < 1e-3 * size


@pytest.mark.parametrize("name", ["FlashVSR", "FlashVSR-v1", "FlashVSR-v1.1"])
def test_weights_that_no_table_knows_ask_for_their_version_whatever_their_folder_is_called(tmp_path, name):
    """Of v1 no hash is published: with the tables as they are its weights are such."""
    folder = write_folder(tmp_path / name, random_parts())
    with pytest.raises(CheckpointError, match=r"'v1' or 'v1\.1'"):
        load_flashvsr(folder)
    assert load_flashvsr(folder, version="v1").version == "v1"
