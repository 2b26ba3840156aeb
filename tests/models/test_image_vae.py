"""An image VAE layer by layer gives what it gives as a whole, whatever the tile, and a failed tile costs one tile."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.image_vae import LayeredJob, decoder_steps, encoder_steps, map_bytes, predicted_bytes
from steadyvsr.models.image_vae.layered import _moments
from steadyvsr.models.tiling import NotFinite
from steadyvsr.models.tiling.areas import Area
from steadyvsr.tests.double.comfy.ldm.modules.diffusionmodules.model import LATENT_CHANNELS, Decoder, Encoder
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
PIXELS = 4
RUN = {"device": CPU, "dtype": torch.float32}


def random_network(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """All weights random, those of the norms too."""
    torch.manual_seed(3)
    network = kind().to(dtype).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if "norm" in name:
            weight.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return network


def both(dtype: torch.dtype = torch.float32):
    """Encoder and decoder with their chains."""
    encoder, decoder = random_network(Encoder, dtype), random_network(Decoder, dtype)
    return (encoder, encoder_steps(encoder, PIXELS), True), (decoder, decoder_steps(decoder, PIXELS), False)


def source(encodes: bool, rows: int, columns: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    shape = (batch, 3, rows * PIXELS, columns * PIXELS) if encodes else (batch, LATENT_CHANNELS, rows, columns)
    return torch.randn(shape, generator=generator, dtype=dtype)


def finished(job: LayeredJob) -> Tensor:
    while job.done < job.total:
        job.advance(lambda: None)
    return job.result


def error(result: Tensor, whole: Tensor) -> float:
    return float((result.double() - whole.double()).norm() / whole.double().norm())


@pytest.mark.parametrize("which", [0, 1], ids=["encode", "decode"])
def test_any_size_and_tile_gives_the_result_of_the_whole(which: int) -> None:
    network, steps, encodes = both()[which]
    drawn = random.Random(which)
    for _ in range(14):
        rows, columns, tile = drawn.randint(1, 9), drawn.randint(1, 9), drawn.choice([4, 8, 12, 20, 32, 64])
        x = source(encodes, rows, columns, drawn.choice([1, 2]))
        job = LayeredJob(steps, x, tile, **RUN)
        total = job.total
        assert error(finished(job), network(x)) < 1e-5, (rows, columns, tile)
        assert job.done == job.total == total


@pytest.mark.parametrize("which", [0, 1], ids=["encode", "decode"])
def test_in_fp64_it_is_the_same_to_ten_digits(which: int) -> None:
    network, steps, encodes = both(torch.float64)[which]
    x = source(encodes, 11, 9, dtype=torch.float64)
    job = LayeredJob(steps, x, 16, device=CPU, dtype=torch.float64)
    assert error(finished(job), network(x)) < 1e-10


@pytest.mark.parametrize("which", [0, 1], ids=["encode", "decode"])
def test_one_position_less_around_any_layer_is_wrong(which: int) -> None:
    network, steps, encodes = both()[which]
    x = source(encodes, 9, 9)
    whole, checked = network(x), 0
    for index, step in enumerate(steps):
        for side in ("before", "after"):
            if getattr(step, side):
                narrow = [*steps[:index], replace(step, **{side: getattr(step, side) - 1}), *steps[index + 1 :]]
                assert error(finished(LayeredJob(narrow, x, 16, **RUN)), whole) > 1e-4, (step.name, side)
                checked += 1
    assert checked > 20


def test_statistics_of_a_tile_alone_are_wrong() -> None:
    network, steps, _ = both()[1]
    x = source(False, 9, 9)
    x[..., :4] *= 3

    class Local(LayeredJob):
        def _statistics(self, norm):
            return tuple(part.clone() for part in _only_last(self, norm))

    def _only_last(job, norm):
        kept, job._known = job._known, job._known[-1:]
        try:
            return LayeredJob._statistics(job, norm)
        finally:
            job._known = kept

    assert error(finished(LayeredJob(steps, x, 8, **RUN)), network(x)) < 1e-5
    assert error(finished(Local(steps, x, 8, **RUN)), network(x)) > 1e-2


@pytest.mark.parametrize("which", [0, 1], ids=["encode", "decode"])
def test_a_layer_that_runs_out_of_memory_is_done_in_smaller_tiles_and_what_is_done_stays(which: int) -> None:
    network, steps, encodes = both()[which]
    x = source(encodes, 8, 6)
    whole, seen = network(x), 0
    for at in range(0, LayeredJob(steps, x, 16, **RUN).total, 11):
        job, failed = LayeredJob(steps, x, 16, **RUN), []

        def compute(area, original, job=job, at=at, failed=failed):
            if job.done == at and not failed:
                failed.append(job.done)
                raise torch.OutOfMemoryError("scripted")
            return original(area)

        job._steps = [replace(s, compute=lambda a, f=s.compute, c=compute: c(a, f)) for s in steps]
        while job.done < job.total:
            try:
                job.advance(lambda: None)
            except torch.OutOfMemoryError:
                job.cut(8)
                assert job.done == at
        seen += len(failed)
        assert error(job.result, whole) < 1e-5
    assert seen > 3


def test_a_tile_that_fits_no_half_is_done_again_in_fp32_and_the_image_goes_on_in_fp32() -> None:
    network, steps, _ = both()[1]
    x = source(False, 6, 6)
    loud = [replace(steps[0], compute=lambda z, f=steps[0].compute: f(z) * 1e5), *steps[1:]]
    job = LayeredJob(loud, x, 16, device=CPU, dtype=torch.float16)
    network.half()
    with pytest.raises(NotFinite, match="conv_in.*float16"):
        job.advance(lambda: None)
    assert job.done == 0
    network.float()
    job.dtype = torch.float32
    job.advance(lambda: None)
    assert job.done == 1 and job._out is not None and job._out.dtype == torch.float32


def test_an_interrupt_leaves_the_job_as_it_was() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    network, steps, _ = both()[1]
    x = source(False, 6, 6)
    job = LayeredJob(steps, x, 16, **RUN)
    job.advance(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        job.advance(stop)
    assert job.done == 1
    assert error(finished(job), network(x)) < 1e-5


def test_what_goes_in_and_comes_out_can_be_changed_piece_by_piece() -> None:
    network, steps, _ = both()[0]
    x = source(True, 5, 6)
    job = LayeredJob(steps, x, 8, **RUN, prepare=lambda p: p.mul_(2).sub_(1), finish=lambda y: y.add_(5))
    before = x.clone()
    assert error(finished(job), network(x * 2 - 1) + 5) < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize("which", [0, 1], ids=["encode", "decode"])
def test_the_prediction_bounds_what_one_tile_takes(which: int) -> None:
    _, steps, encodes = both()[which]
    x = source(encodes, 40, 40)
    job = LayeredJob(steps, x, 32, **RUN)
    taken = 0
    while job.done < job.total:
        with StorageTracker() as tracker:
            job.advance(lambda: None)
            left = tracker.now
        taken = max(taken, tracker.peak - left)
    predicted = predicted_bytes(steps, (160, 160), 32, 4)
    assert 0.3 * predicted < taken < predicted


def test_the_images_between_the_layers_take_what_was_predicted() -> None:
    _, steps, _ = both()[1]
    job = LayeredJob(steps, source(False, 30, 30), 32, **RUN)
    most = 0
    while job.done < job.total:
        job.advance(lambda: None)
        out = job._out.nbytes if job._out is not None else 0
        kept = job._kept.nbytes if job._kept.data_ptr() != job._map.data_ptr() else 0
        most = max(most, job._map.nbytes + out + kept)
    assert most == map_bytes(steps, (120, 120), 4)


def test_areas_cover_an_image_once() -> None:
    seen = torch.zeros(37, 52)
    for area in Area.whole(37, 52).parts(16, 2):
        area.of(seen).add_(1)
        assert max(area.shape) <= 16 and area.rows.start % 2 == area.columns.start % 2 == 0
    assert torch.equal(seen, torch.ones_like(seen))


def test_what_is_built_otherwise_is_refused_with_its_name() -> None:
    decoder = random_network(Decoder)
    decoder.up[1].block[0].conv1 = torch.nn.Conv2d(16, 8, 3, padding=1, padding_mode="replicate")
    with pytest.raises(ValueError, match=r"up\.1\.block\.0\.conv1"):
        decoder_steps(decoder, PIXELS)
    encoder = random_network(Encoder)
    encoder.down[0].attn.append(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"down\.0 has attention"):
        encoder_steps(encoder, PIXELS)
    with pytest.raises(ValueError, match="pixels per latent"):
        encoder_steps(random_network(Encoder), 8)
    strange = random_network(Decoder)
    strange.mid.block_1.gate = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"mid\.block_1"):
        decoder_steps(strange, PIXELS)


def test_statistics_become_fp64_on_the_cpu_alone() -> None:
    """Macs and some Intel cards know no fp64."""

    class OnCard(TorchFunctionMode):
        """Everything that was not fetched with `cpu` counts as on the card."""

        def __init__(self) -> None:
            super().__init__()
            self.fetched: set[int] = set()
            self.widened: list[bool] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.double:
                self.widened.append(id(args[0]) in self.fetched)
            result = func(*args, **(kwargs or {}))
            if func is torch.Tensor.cpu:
                self.fetched.add(id(result))
            return result

    with OnCard() as card:
        _moments(torch.randn(1, 8, 4, 4), 4)
    assert card.widened and all(card.widened)
