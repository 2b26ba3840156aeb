"""Who holds a storage: planted leaks are named; what is gone is not; running frames are left alone; time is bounded."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steadyvsr.memory import holders
from steadyvsr.memory.offload import Verdict
from steadyvsr.tests.memory.test_offload import SimulatedModel
from torch import nn

MIB = 1 << 20
LEAKED_LIST: list[Any] = []
LEAKED_FUNCTIONS: list[Any] = []
LEAKED_ERRORS: list[BaseException] = []
LEAKED_LOCAL = threading.local()
HOOKED = nn.Linear(2, 2)
PENDING: list[Any] = []


class Keeper:
    view: Any = None


class NodeCache:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.outputs = {"3": [[{"samples": tensor}]]}


@functools.lru_cache(maxsize=4)
def cached(name: str) -> torch.Tensor:
    return PENDING.pop()


def in_a_list(tensor: torch.Tensor) -> None:
    LEAKED_LIST.append([tensor])


def in_a_closure(tensor: torch.Tensor) -> None:
    def callback() -> torch.Tensor:
        return tensor

    LEAKED_FUNCTIONS.append(callback)


def as_a_view(tensor: torch.Tensor) -> None:
    keeper = Keeper()
    keeper.view = tensor[1000:1004].reshape(2, 2)
    LEAKED_LIST.append(keeper)


def in_a_graph(tensor: torch.Tensor) -> None:
    weight = torch.ones(1, requires_grad=True)
    LEAKED_LIST.append((weight * tensor).sum() * 2)


def in_a_patcher(tensor: torch.Tensor) -> Any:
    return types.SimpleNamespace(backup={"diffusion_model.weight": (tensor, False)})


def in_an_exception(tensor: torch.Tensor) -> None:
    def fails(latents: torch.Tensor) -> None:
        raise ValueError("out of luck")

    try:
        fails(tensor)
    except ValueError as error:
        LEAKED_ERRORS.append(error)


def in_an_lru_cache(tensor: torch.Tensor) -> None:
    PENDING.append(tensor)
    cached("key")


def in_a_thread_local(tensor: torch.Tensor) -> None:
    LEAKED_LOCAL.last = tensor


def in_a_hook(tensor: torch.Tensor) -> None:
    HOOKED.register_forward_hook(lambda module, args, output: output + tensor.sum())


def in_a_generator(tensor: torch.Tensor) -> None:
    def stream():
        yield tensor.shape
        yield tensor

    generator = stream()
    next(generator)
    LEAKED_LIST.append(generator)


@pytest.fixture(autouse=True)
def nothing_stays_planted():
    yield
    for leaked in (LEAKED_LIST, LEAKED_FUNCTIONS, LEAKED_ERRORS, PENDING):
        leaked.clear()
    cached.cache_clear()
    vars(LEAKED_LOCAL).clear()
    HOOKED._forward_hooks.clear()


def search(plant: Callable[[torch.Tensor], Any], roots: Callable[[Any], dict] = lambda kept: {}) -> holders.Found:
    tensor = torch.zeros(MIB // 4)
    watched = holders.watch([("blocks.0.weight", tensor)])
    kept = plant(tensor)
    del tensor
    return holders.find(watched, roots(kept), seconds=20.0)


PLANTED = [
    (in_a_list, None, ["global LEAKED_LIST", "[0][0]"]),
    (in_a_closure, None, ["global LEAKED_FUNCTIONS", "closure of in_a_closure.<locals>.callback"]),
    (as_a_view, None, ["global LEAKED_LIST", "Keeper.view"]),
    (in_a_graph, None, ["autograd graph (MulBackward0)", "global LEAKED_LIST"]),
    (in_a_patcher, lambda kept: {"backup of Wan": kept.backup}, ["backup of Wan"]),
    (in_an_exception, None, ["traceback of ValueError", "local latents of fails()"]),
    (in_an_lru_cache, None, ["LRU cache of cached"]),
    (in_a_thread_local, None, ["global LEAKED_LOCAL", "thread local"]),
    (NodeCache, lambda kept: {"node cache": lambda: kept.outputs}, ["node cache"]),
    (in_a_hook, None, ["global HOOKED", "_forward_hooks", "closure of in_a_hook"]),
    (in_a_generator, None, ["global LEAKED_LIST", "suspended generator in_a_generator.<locals>.stream"]),
]


@pytest.mark.parametrize(("plant", "roots", "expected"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED])
def test_a_planted_leak_is_named(plant, roots, expected) -> None:
    found = search(plant, roots or (lambda kept: {}))
    assert found.complete and (found.alive, found.unnamed) == (MIB, 0)
    names = " | ".join(holder.name for holder in found.holders)
    assert all(word in names for word in expected), names
    assert found.holders[0].bytes == MIB and found.holders[0].tensors == ("blocks.0.weight",)


def test_weights_that_never_moved_are_named_by_their_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found = holders.find(holders.watch(model.named_parameters()), seconds=20.0)
    assert [holder.name for holder in found.holders] == ["weights of module Sequential"]
    assert found.holders[0].bytes == found.alive == sum(p.nbytes for p in model.parameters())


def test_a_storage_that_is_gone_is_not_searched_for() -> None:
    tensor = torch.zeros(MIB // 4)
    watched = holders.watch([("x", tensor)])
    assert watched[0].alive
    del tensor
    assert not watched[0].alive
    assert holders.find(watched, {"never opened": lambda: pytest.fail("opened")}).alive == 0


def test_a_local_of_a_running_function_is_left_unnamed_and_dies_with_it() -> None:
    def runs() -> list[holders.Watched]:
        tensor = torch.zeros(MIB // 4)
        watched = holders.watch([("x", tensor)])
        found = holders.find(watched, seconds=20.0)
        assert found.holders == () and found.unnamed == MIB and tensor.numel()
        return watched

    assert not runs()[0].alive


def test_a_running_function_is_not_walked_though_an_exception_passed_through_it() -> None:
    tensor = torch.zeros(MIB // 4)
    watched = holders.watch([("x", tensor)])
    try:
        raise ValueError("caught here, while the frame still runs")
    except ValueError as error:
        LEAKED_ERRORS.append(error)
    found = holders.find(watched, seconds=20.0)
    assert found.holders == () and found.unnamed == tensor.nbytes


def test_a_frame_that_somebody_keeps_is_not_walked() -> None:
    def returns() -> list[holders.Watched]:
        tensor = torch.zeros(MIB // 4)
        LEAKED_LIST.append(sys._getframe())
        return holders.watch([("x", tensor)])

    found = holders.find(returns(), seconds=20.0)
    assert found.holders == () and found.unnamed == MIB


def test_the_search_keeps_nothing_alive() -> None:
    tensor = torch.zeros(MIB // 4)
    watched = holders.watch([("x", tensor)])
    LEAKED_LIST.append(tensor)
    del tensor
    holders.find(watched, seconds=20.0)
    LEAKED_LIST.clear()
    assert not watched[0].alive


def test_views_and_tied_weights_are_watched_once() -> None:
    layer = nn.Linear(16, 16, bias=False)
    named = [("a", layer.weight), ("b", layer.weight.data.T), ("meta", torch.zeros(5, device="meta"))]
    assert [(item.name, item.bytes) for item in holders.watch(named)] == [("a", 1024)]


def test_two_holders_of_one_storage_are_both_named() -> None:
    found = search(lambda tensor: [tensor], lambda kept: {"node cache": kept, "patcher backup": kept})
    assert {holder.name for holder in found.holders} == {"node cache", "patcher backup"}


def test_when_the_time_is_up_the_search_says_that_it_is_incomplete() -> None:
    moments = iter(range(1000))
    tensor = torch.zeros(MIB // 4)
    found = holders.find(holders.watch([("x", tensor)]), seconds=1.5, clock=lambda: float(next(moments)))
    assert not found.complete and found.unnamed == MIB


def test_bytes_of_a_labelled_root_count_every_storage_once_and_only_on_the_device() -> None:
    tensor = torch.zeros(MIB // 4)
    root = {"a": tensor, "b": [tensor[5:]], "elsewhere": torch.zeros(9, device="meta")}
    assert holders.root_bytes(root, torch.device("cpu")) == MIB
    assert holders.root_bytes(root, torch.device("cuda:0")) == 0


def test_a_leak_of_many_weights_is_one_short_line_and_stands_whole_in_the_report() -> None:
    """123 weights in a list were a line of 11,648 characters."""
    model = SimulatedModel()
    model.network = nn.ModuleList(nn.Linear(8, size, bias=False) for size in range(1, 124))
    model.size = model.loaded = sum(parameter.nbytes for parameter in model.network.parameters())

    def move() -> None:
        LEAKED_LIST.extend(parameter.data for parameter in model.network.parameters())
        model.move()
        model.loaded = model.size  # what the card still holds

    receipt = model.offload(move)
    line = str(receipt)
    assert receipt.verdict is Verdict.STILL_HELD and len(line) <= 600, f"{len(line)}: {line}"
    assert "by global LEAKED_LIST in module" in line, line
    assert "(123 tensors: 122.weight, 121.weight, 120.weight, …)" in line, line
    (holder,) = receipt.to_json()["held"]
    assert (holder["bytes"], len(holder["tensors"]), len(set(holder["paths"]))) == (model.size, 123, 123)
    assert holder["paths"][0].endswith("test_holders[122]")


def test_tensors_of_many_like_objects_are_one_holder() -> None:
    tensors = [torch.zeros(MIB // 4) for _ in range(5)]
    watched = holders.watch((f"x{index}", tensor) for index, tensor in enumerate(tensors))
    for tensor in tensors:
        as_a_view(tensor)
    tensor = tensors.clear()
    found = holders.find(watched, seconds=20.0)
    (holder,) = found.holders
    assert holder.name.startswith("global LEAKED_LIST in module") and holder.name.endswith("[…] → Keeper.view")
    assert holder.bytes == 5 * MIB and sorted(holder.tensors) == ["x0", "x1", "x2", "x3", "x4"]
