"""The loader nodes inside a real ComfyUI: what they predict, what they ask ComfyUI for, and what they survive.

The states are observed by loading_session.py, which runs in ComfyUI's own process on a simulated card.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

LOADERS = ["LoadDiffusionModel", "LoadCLIP", "LoadVAE", "LoadCheckpoint"]
SESSIONS = ("loading_session.py",)
CARDS = ("books", "simcard")


@pytest.mark.parametrize("name", LOADERS)
def test_what_was_offloaded_computes_the_same_again(observed, name):
    seen = scenario(observed, "used_again")[name]
    assert seen["before"] > 2_000_000 and seen["networks"] == (2 if name == "LoadCheckpoint" else 1)
    assert (seen["after"], seen["asked"], seen["verdicts"]) == (0, seen["before"], ["FREED"])
    assert seen["numbers"] > 1000 and seen["finite"] and seen["same"]


@pytest.mark.parametrize("name", [*LOADERS, "fp8_e4m3fn", "fp8_e5m2", "quantised"])
def test_weights_are_predicted_from_the_header_in_the_format_they_will_have(observed, name):
    """The text encoder's file also holds a tokenizer of 240 kB; ComfyUI adds a table of noise levels to a model."""
    expected, loaded = scenario(observed, "predicted")[name]
    assert abs(expected - loaded) <= {"LoadCLIP": 250_000, "quantised": 0}.get(name, 30_000)
    assert loaded > 800_000


@pytest.mark.parametrize("name", ["plain.pt", "damaged.safetensors"])
def test_a_file_without_a_header_counts_with_its_size(observed, name):
    predicted, size = scenario(observed, "predicted")[name]
    assert predicted == size > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_load_clip_asks_what_the_stock_loader_of_as_many_files_asks(observed, count):
    stock, ours = scenario(observed, "clip_files")[str(count)].values()
    assert len(ours["files"]) == count
    # The stock loaders of three and four files have no type, and ComfyUI asks for none there.
    assert ours == stock if count < 3 else {**ours, "type": ""} == {**stock, "type": ""}


def test_a_text_encoder_on_the_cpu_is_what_the_stock_loader_puts_there(observed):
    stock, ours = scenario(observed, "clip_files")["cpu"].values()
    assert ours == stock and ours["options"]["load_device"] == "cpu"


@pytest.mark.parametrize("name", LOADERS)
def test_counters_that_die_leave_a_loaded_model_and_a_marked_verdict(observed, name):
    seen = scenario(observed, "counters_die")[name]
    assert seen["before"] >= 1 and seen["after"] == {}
    assert seen["verdicts"] == ["UNVERIFIABLE"]


def test_without_counters_nothing_is_chosen_or_admitted_by_guess(observed, device):
    seen = scenario(observed, "counters_die")
    assert f"{device} unknown free" in seen["auto"] and "cannot be read" in seen["admission"]
    assert seen["recovered"] == device


def test_a_model_beyond_the_ram_for_kept_models_works_but_is_not_kept(observed):
    seen = scenario(observed, "small_budgets")
    assert seen["keep"] == {"policy": "no", "reason": "released: kept models may fill 0.95 MiB of RAM together"}
    assert seen["works"] is True
    assert seen["pin"] == {"policy": "pin", "reason": "as this node asks"}


def test_of_kept_models_the_one_not_used_for_longest_goes_first(observed):
    seen = scenario(observed, "small_budgets")["least recently used goes first"]
    assert seen == {
        "LoadVAE": ["vae"], "LoadCLIP": ["vae", "clip"], "LoadDiffusionModel": ["clip", "diffusion model"],
    }  # fmt: skip


def test_auto_goes_by_the_weights_not_by_the_file(observed, device):
    error = scenario(observed, "small_budgets")["between file and weights"]
    assert "expected 3.33 MiB free" in error and f"{device} 1.76 MiB free" in error
