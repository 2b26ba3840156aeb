"""Tiles through any network: shapes, sums, sizes of the calls, and what stays when a tile fails."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyvsr.models.tiling import THREE_GRIDS, BlendDecode, BlendEncode, NotFinite
from torch import Tensor

CPU = torch.device("cpu")
RUN = {"device": CPU, "dtype": torch.float32}
COMPRESSION = 8
CASES = 2000


def pool(x: Tensor) -> Tensor:
    """Averages 8×8 pixels; of a clip every fourth frame, as a causal VAE counts them."""
    if x.ndim == 4:
        return F.avg_pool2d(x, COMPRESSION)
    return F.avg_pool3d(x[:, :, ::4], (1, COMPRESSION, COMPRESSION))


def repeat(z: Tensor) -> Tensor:
    z = z.repeat_interleave(COMPRESSION, -1).repeat_interleave(COMPRESSION, -2)
    return z if z.ndim == 4 else z.repeat_interleave(4, 2)[:, :, 3:]


class Spy:
    """Stands before a network: the sides of what it was given."""

    def __init__(self, network) -> None:
        self.network, self.sides, self.frames, self.batches = network, [], set(), set()

    def __call__(self, x: Tensor) -> Tensor:
        self.sides.append(max(x.shape[-2:]))
        self.frames.add(x.shape[2] if x.ndim == 5 else 1)
        self.batches.add(x.shape[0])
        return self.network(x)


def finished(job):
    while job.done < job.total:
        job.advance(lambda: None)
    return job.result


def test_any_size_tile_and_overlap_gives_the_right_shape_finite_or_an_error_that_says_why() -> None:
    drawn, refused, tiled = random.Random(5), 0, 0
    for _ in range(CASES):
        batch, latents = drawn.choice([1, 1, 2, 3]), drawn.choice([0, 1, 1, 2, 4])
        rows, columns = drawn.randint(1, 8), drawn.randint(1, 8)
        tile, overlap = drawn.choice([8, 15, 16, 24, 33, 64, 100, 256]), drawn.choice([-8, 0, 1, 8, 16, 20, 64, 400])
        time = [] if latents == 0 else [latents]
        frames = [] if latents == 0 else [4 * latents - 3]
        pixels = torch.rand(batch, 3, *frames, rows * COMPRESSION, columns * COMPRESSION)
        codes = torch.rand(batch, 4, *time, rows, columns)
        for kind, source, network, shape in (
            (BlendEncode, pixels, Spy(pool), (batch, 3, *time, rows, columns)),
            (BlendDecode, codes, Spy(repeat), (batch, 4, *frames, rows * COMPRESSION, columns * COMPRESSION)),
        ):
            try:
                job = kind(network, source, tile, overlap, COMPRESSION, **RUN)
            except ValueError as error:
                assert overlap < 0 or overlap > tile // 2 or tile < 2 * COMPRESSION, error
                assert "expected" in str(error) and "got" in str(error)
                refused += 1
                continue
            assert 0 <= overlap <= tile // 2 and tile >= 2 * COMPRESSION
            result = finished(job)
            assert result.shape == shape and result.isfinite().all()
            unit = 1 if kind is BlendEncode else COMPRESSION
            assert max(network.sides) * unit <= tile
            assert network.frames == {source.shape[2] if latents else 1} and network.batches == {1}
            tiled += job.total > batch
            torch.testing.assert_close(result, network.network(source), atol=2e-6, rtol=0)
    assert refused > 500 and tiled > 500


@given(st.integers(1, 12), st.integers(1, 12), st.integers(16, 64), st.integers(0, 32))
@settings(max_examples=100)
def test_every_position_gets_weight_one(rows: int, columns: int, tile: int, overlap: int) -> None:
    job = BlendDecode(lambda z: torch.ones_like(repeat(z)), torch.zeros(1, 1, rows, columns), tile,
                      min(overlap, tile // 2), COMPRESSION, **RUN)  # fmt: skip
    torch.testing.assert_close(finished(job), torch.ones(1, 1, rows * COMPRESSION, columns * COMPRESSION))


def test_a_network_of_small_reach_gives_the_result_of_the_whole() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 4, 3, 3)

    def network(z: Tensor) -> Tensor:
        return repeat(F.conv2d(z, kernel, padding=1))

    latents = torch.randn(1, 4, 32, 48)
    whole = network(latents)
    # An overlap of 8 latents discards 2 on each side: more than the 1 that the kernel reaches.
    exact = finished(BlendDecode(network, latents, 128, 64, COMPRESSION, **RUN))
    torch.testing.assert_close(exact, whole, atol=1e-5, rtol=0)
    near = finished(BlendDecode(network, latents, 128, 0, COMPRESSION, **RUN))
    assert (near - whole).abs().max() > 0.1


def test_a_tile_that_failed_is_tried_again_and_the_others_are_kept() -> None:
    calls, failures = Spy(pool), [3]

    def network(x: Tensor) -> Tensor:
        result = calls(x)
        if len(calls.sides) in failures:
            raise MemoryError
        return result

    pixels = torch.rand(1, 3, 96, 96)
    job = BlendEncode(network, pixels, 64, 16, COMPRESSION, **RUN)
    done = []
    while job.done < job.total:
        try:
            job.advance(lambda: None)
        except MemoryError:
            done.append(job.done)
            job.cut(64)
    assert done == [2] and len(calls.sides) == job.total + 1
    torch.testing.assert_close(job.result, pool(pixels))


def test_smaller_tiles_begin_anew_with_the_same_result() -> None:
    pixels = torch.rand(2, 3, 96, 120)
    job = BlendEncode(pool, pixels, 64, 32, COMPRESSION, **RUN)
    for _ in range(3):
        job.advance(lambda: None)
    job.cut(32)
    assert (job.done, job.tile, job.overlap) == (0, 32, 16)
    torch.testing.assert_close(finished(job), pool(pixels))


def test_a_cut_that_is_too_small_changes_nothing() -> None:
    job = BlendEncode(pool, torch.rand(1, 3, 96, 96), 64, 32, COMPRESSION, **RUN)
    job.advance(lambda: None)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        job.cut(8)
    assert (job.done, job.tile, job.overlap) == (1, 64, 32)


def test_an_interrupt_leaves_through_the_job_and_no_tile_is_counted() -> None:
    class Stop(BaseException):
        pass

    def stop() -> None:
        raise Stop

    job = BlendEncode(pool, torch.rand(1, 3, 96, 96), 64, 32, COMPRESSION, **RUN)
    with pytest.raises(Stop):
        job.advance(stop)
    assert job.done == 0
    torch.testing.assert_close(finished(job), pool(job._source))


def test_a_tile_with_nan_is_named_with_its_dtype_and_can_be_tried_again() -> None:
    def network(x: Tensor) -> Tensor:
        return pool(x.float()) if x.dtype == torch.float32 else pool(x.float()) * float("nan")

    job = BlendEncode(network, torch.rand(1, 3, 64, 96), 64, 32, COMPRESSION, device=CPU, dtype=torch.float16)
    with pytest.raises(NotFinite, match=r"sample 0, rows 0–64, columns 0–64, in float16"):
        job.advance(lambda: None)
    assert job.done == 0
    job.dtype = torch.float32
    torch.testing.assert_close(finished(job), pool(job._source))


def test_nan_in_the_input_is_told_from_nan_of_the_network() -> None:
    pixels = torch.rand(1, 3, 64, 64)
    pixels[0, 0, 5, 5] = float("nan")
    with pytest.raises(NotFinite, match="not finite already"):
        BlendEncode(pool, pixels, 64, 32, COMPRESSION, **RUN).advance(lambda: None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.zeros(0, 3, 64, 64), "without an empty axis"),
        (torch.zeros(3, 64, 64), "NCHW or NCTHW"),
        (torch.zeros(1, 3, 60, 64), "multiples of 8"),
    ],
)
def test_a_source_that_no_tile_fits_is_refused(source: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlendEncode(pool, source, 64, 0, COMPRESSION, **RUN)


def test_a_network_whose_results_do_not_fit_together_is_an_error_not_a_wrong_image() -> None:
    with pytest.raises(ValueError, match="whole number of positions"):
        finished(BlendDecode(lambda z: repeat(z)[..., 1:], torch.rand(1, 4, 8, 8), 32, 8, COMPRESSION, **RUN))
    frames, latents = iter(range(2, 9)), torch.rand(1, 4, 1, 8, 8)
    job = BlendDecode(lambda z: torch.zeros(1, 3, next(frames), 32, 32), latents, 32, 8, COMPRESSION, **RUN)
    job.advance(lambda: None)
    with pytest.raises(ValueError, match="results of one shape"):
        job.advance(lambda: None)


def test_the_spot_sees_seams_and_is_silent_where_there_are_none() -> None:
    latents = torch.rand(1, 4, 16, 16)

    def shifts(z: Tensor) -> Tensor:
        return repeat(z - z.mean())

    good = BlendDecode(repeat, latents, 64, 16, COMPRESSION, spot=True, **RUN)
    bad = BlendDecode(shifts, latents, 64, 16, COMPRESSION, spot=True, **RUN)
    alone = BlendDecode(shifts, latents, 128, 16, COMPRESSION, spot=True, **RUN)
    for job in (good, bad, alone):
        finished(job)
    assert good.total == good.grid[0] * good.grid[1] + 1 and alone.total == 1
    assert good.spot_db is not None and bad.spot_db is not None
    assert good.spot_db > 100 and bad.spot_db < 60 and alone.spot_db is None


@pytest.mark.parametrize("kind", [BlendEncode, BlendDecode])
def test_three_grids_are_three_results_and_their_mean(kind):
    """A network that is wrong by a number of its own for each tile: three grids in the mean, each with its share."""
    source = torch.rand(1, 3, 96, 128) if kind is BlendEncode else torch.rand(1, 4, 12, 16)
    plain = pool if kind is BlendEncode else repeat
    shapes: list[tuple[int, ...]] = []

    def network(tile: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tile.shape[-2:]))
        return plain(tile)

    job = kind(network, source, 64, 16, COMPRESSION, shapes=THREE_GRIDS, **RUN)
    result = finished(job)
    unit = 1 if kind is BlendEncode else COMPRESSION
    sides = {(height * unit, width * unit) for height, width in shapes}
    assert sides == {(64, 64), (32, 128), (96, 32)} and len(shapes) == job.total > 6
    torch.testing.assert_close(result, plain(source))
    single = kind(plain, source, 512, 16, COMPRESSION, shapes=THREE_GRIDS, **RUN)
    assert single.total == 1  # an image of one tile is computed once
