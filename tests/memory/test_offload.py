"""Verified offload: the verdict for every way in which a card can behave, the receipt, and a model that still works."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from steadyvsr.memory import holders
from steadyvsr.memory.offload import Receipt, Subject, Verdict, judge, offload
from steadyvsr.memory.probe import ScriptedProbe
from steadyvsr.memory.reading import Figure, Reading, exact
from steadyvsr.tests.memory.doubles import GIB, MIB, FakeCardBooks
from torch import nn

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")
SIMULATED = torch.device("cpu:0")
SIZE = 6 * GIB


@pytest.fixture(autouse=True, scope="module")
def collections_are_quick():
    """Every offload collects garbage: leave out what the test session itself has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Model:
    """A model of SIZE bytes on a scripted card; `behaviour` says what its offload really does."""

    def __init__(self, behaviour: str, size: int = SIZE) -> None:
        self.behaviour, self.size, self.loaded = behaviour, size, size
        self.card = FakeCardBooks()
        self.card.use(size)
        self.card.nvml = behaviour != "no NVML"
        self.network = nn.Linear(2, 2)
        self.cleaned = 0

    def move(self) -> None:
        card = self.card
        if self.behaviour == "raises":
            card.broken = True
        if self.behaviour == "not at all":
            self.loaded = 0
            return
        if self.behaviour == "stubbed":
            return
        self.loaded = 0
        card.use(-self.size)
        card.pool = self.size
        if self.behaviour == "part stays":
            card.use(self.size // 10)
        if self.behaviour == "noisy":
            card.others += 3 * GIB

    def clean(self) -> None:
        self.cleaned += 1
        if self.behaviour != "to the pool only":
            self.card.pool = 0

    def subject(self, **changes) -> Subject:
        values = {
            "name": "Wan", "load_device": CARD, "offload_device": CPU, "loaded_bytes": lambda: self.loaded,
            "move": self.move, "tensors": lambda: self.network.named_parameters(), "roots": {},
        }  # fmt: skip
        return Subject(**{**values, **changes})

    def offload(self, **changes) -> Receipt:
        return offload(self.subject(**changes), self.clean, reader=ScriptedProbe(self.card.read))


VERDICTS = [
    ("fully", Verdict.FREED),
    ("to the pool only", Verdict.FREED_TO_POOL),
    ("not at all", Verdict.STILL_HELD),
    ("stubbed", Verdict.STILL_HELD),
    ("raises", Verdict.UNVERIFIABLE),
    ("noisy", Verdict.FREED),
    ("no NVML", Verdict.FREED),
]


@pytest.mark.parametrize("size", [6 * GIB, 100 * MIB, 3 * MIB], ids=["6 GiB", "100 MiB", "3 MiB"])
@pytest.mark.parametrize(("behaviour", "verdict"), VERDICTS)
def test_the_verdict_is_what_the_card_did(behaviour: str, verdict: Verdict, size: int) -> None:
    receipt = Model(behaviour, size).offload()
    assert receipt.verdict is verdict, receipt


def test_a_tenth_that_stays_is_still_held() -> None:
    receipt = Model("part stays").offload()
    assert receipt.verdict is Verdict.STILL_HELD and receipt.left_tensors == SIZE - SIZE // 10


def test_nothing_loaded_is_not_moved_and_not_called_freed() -> None:
    model = Model("fully")
    model.loaded = 0
    receipt = model.offload(move=lambda: pytest.fail("moved"))
    assert receipt.verdict is Verdict.NOT_LOADED and not receipt.freed and receipt.before is None


def test_a_model_that_rests_where_it_computes_cannot_be_offloaded() -> None:
    receipt = Model("fully").offload(offload_device=CARD, move=lambda: pytest.fail("moved"))
    assert receipt.verdict is Verdict.CANNOT_OFFLOAD and "cannot offload" in str(receipt)


def test_a_device_without_counters_and_an_unchanged_process_is_unverifiable() -> None:
    model = Model("fully")
    receipt = offload(model.subject(), model.clean, reader=ScriptedProbe(lambda device: Reading(device)))
    assert receipt.verdict is Verdict.UNVERIFIABLE and receipt.left_tensors is None
    assert "tensors not countable" in str(receipt)


def test_books_that_still_list_the_model_are_not_outvoted_by_a_counter() -> None:
    model = Model("fully")
    receipt = model.offload(loaded_bytes=lambda: SIZE)
    assert receipt.verdict is Verdict.STILL_HELD and "the books still say 6.00 GiB" in receipt.notes


def test_storages_that_live_on_outweigh_a_counter_that_went_down() -> None:
    empty, full = Reading("cuda:0", allocated=exact(0, "t")), Reading("cuda:0", allocated=exact(SIZE, "t"))
    assert judge(SIZE, 0, 2 * MIB, full, empty)[0] is Verdict.STILL_HELD
    assert judge(SIZE, 0, 0, full, empty)[0] is not Verdict.STILL_HELD


def test_nvml_that_dies_between_the_readings_is_not_subtracted_from_another_source() -> None:
    model = Model("fully")
    receipt = model.offload(move=lambda: (model.move(), setattr(model.card, "nvml", False)))
    assert receipt.verdict is Verdict.FREED and receipt.left_driver.bytes is None


def test_dynamic_weights_count_on_both_sides() -> None:
    def reading(dynamic: int) -> Reading:
        pool = exact(GIB, "torch.cuda")
        return Reading("cuda:0", allocated=pool, reserved=pool, dynamic=exact(dynamic, "dynamic VRAM"))

    assert judge(SIZE, 0, 0, reading(SIZE), reading(0))[0] is Verdict.FREED
    assert judge(SIZE, 0, 0, reading(SIZE), reading(SIZE))[0] is Verdict.STILL_HELD


def test_a_driver_figure_of_the_whole_device_alone_frees_only_with_a_note() -> None:
    def reading(used: int) -> Reading:
        return Reading("cuda:0", allocated=exact(used, "t"), used=Figure(used, "mem_get_info", "whole device"))

    verdict, notes = judge(SIZE, 0, 0, reading(SIZE), reading(0))
    assert verdict is Verdict.FREED and "whole device only" in notes[0]


def test_the_steps_come_in_their_order() -> None:
    model, steps = Model("fully"), []
    reader = ScriptedProbe(lambda device: (steps.append("read"), model.card.read(device))[1])
    reader.synchronise = lambda device: steps.append("synchronise")
    subject = model.subject(move=lambda: (steps.append("move"), model.move()))
    offload(subject, lambda: (steps.append("clean"), model.clean()), reader=reader, drop=lambda: steps.append("drop"))
    assert steps == ["read", "move", "drop", "clean", "synchronise", "read"]


def test_a_move_that_fails_in_torch_is_in_the_receipt_and_measured() -> None:
    def move() -> None:
        raise torch.OutOfMemoryError("no room in RAM")

    receipt = Model("fully").offload(move=move)
    assert receipt.verdict is Verdict.STILL_HELD and "no room in RAM" in str(receipt)


def test_an_interrupt_of_the_move_leaves() -> None:
    def move() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model("fully").offload(move=move)


def test_the_receipt_is_one_line_of_measured_amounts() -> None:
    receipt = Receipt(
        "Wan", "cuda:0", Verdict.FREED, int(6.1 * GIB), 0, left_tensors=int(6.1 * GIB),
        left_driver=Figure(int(6.02 * GIB), "NVML", "exact"), seconds=0.412,
        held=(holders.Holder("stream buffers", int(0.08 * GIB)),),
    )  # fmt: skip
    assert str(receipt) == (
        "asked 6.10 GiB · left the tensors 6.10 · left the driver 6.02 (NVML) · held 0.08 by stream buffers · 0.41 s"
    )


def test_a_verdict_other_than_freed_stands_in_the_line() -> None:
    assert "FREED_TO_POOL" in str(Model("to the pool only").offload())
    assert "FREED" not in str(Model("fully").offload())


def test_a_holder_s_name_may_hold_braces() -> None:
    held = (holders.Holder("global CACHE['{x}']", MIB),)
    assert "CACHE['{x}']" in str(Receipt("a", "cuda:0", Verdict.STILL_HELD, GIB, 0, held=held))


def test_a_receipt_is_plain_json_with_its_line() -> None:
    data = json.loads(json.dumps(Model("fully").offload().to_json()))
    assert data["verdict"] == "FREED" and data["before"]["allocated"]["bytes"] == SIZE
    assert data["line"].startswith("asked 6.00 GiB")


class SimulatedModel:
    """A real network on a simulated card, `cpu:0`, whose books feed the probe; the move copies, as ComfyUI's does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
        self.size = sum(parameter.nbytes for parameter in self.network.parameters())
        self.loaded = self.size

    def move(self) -> None:
        for parameter in self.network.parameters():
            parameter.data = parameter.data.clone()
        self.loaded = 0

    def offload(self, move=None, **changes) -> Receipt:
        def read(device: str) -> Reading:
            return Reading(device, allocated=exact(self.loaded, "books"), reserved=exact(self.loaded, "books"))

        subject = Subject(
            "tiny", SIMULATED, CPU, lambda: self.loaded, move or self.move, self.network.named_parameters, **changes
        )
        return offload(subject, lambda: None, reader=ScriptedProbe(read), seconds=20.0)


def test_an_offloaded_model_gives_the_same_output_and_the_receipt_says_where_it_is() -> None:
    model, x = SimulatedModel(), torch.randn(3, 256)
    with torch.no_grad():
        before = model.network(x)
        receipt = model.offload()
        assert torch.equal(model.network(x), before)
    assert receipt.verdict is Verdict.FREED and receipt.parameters == {"cpu": model.size}


def test_weights_in_a_reference_cycle_are_collected_before_the_second_reading() -> None:
    model = SimulatedModel()
    watched = holders.watch(model.network.named_parameters())

    def move() -> None:
        cycle: list = [[parameter.data for parameter in model.network.parameters()]]
        cycle.append(cycle)
        model.move()

    gc.disable()
    try:
        assert model.offload(move).freed and not any(item.alive for item in watched)
    finally:
        gc.enable()


def test_an_offload_that_did_nothing_names_the_model_and_its_bytes() -> None:
    model = SimulatedModel()
    receipt = model.offload(move=lambda: None)
    assert receipt.verdict is Verdict.STILL_HELD
    assert [(holder.name, holder.bytes) for holder in receipt.held] == [("weights of module Sequential", model.size)]


def test_a_kept_copy_is_named_by_its_label() -> None:
    model = SimulatedModel()
    backup = {"0.weight": model.network[0].weight.data}

    def move() -> None:
        model.move()
        model.loaded = backup["0.weight"].nbytes  # what the card still holds

    receipt = model.offload(move, roots={"patcher backup": backup})
    assert receipt.verdict is Verdict.STILL_HELD
    assert [(holder.name, holder.bytes) for holder in receipt.held] == [("patcher backup", 256 * 512 * 4)]


def test_a_receipt_never_grows_beyond_a_paragraph() -> None:
    held = tuple(holders.Holder("global " + "x" * 300, MIB, ("y" * 300,) * 5) for _ in range(20))
    receipt = Receipt("a", "cuda:0", Verdict.STILL_HELD, GIB, 0, held=held, unnamed=MIB, error="z" * 2000)
    assert len(str(receipt)) <= 600 and "17 more" in str(receipt) and "STILL_HELD" in str(receipt)


@pytest.mark.parametrize(
    ("searched", "words"), [(True, "by nothing that Python shows"), (False, "by nobody found in time")]
)
def test_a_search_that_ran_out_of_time_does_not_say_that_nobody_holds_it(searched: bool, words: str) -> None:
    """What it could not look at may well be shown by Python."""
    receipt = Receipt("A", "cuda:0", Verdict.STILL_HELD, MIB, 0, unnamed=MIB, searched=searched)
    assert words in str(receipt)
