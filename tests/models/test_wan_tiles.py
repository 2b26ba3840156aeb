"""The Wan 2.1 VAE in exact tiles: the whole frame's result, what a tile reads, what is held, and how a job goes on."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from steadyvsr.benchmarks.shape_run import ShapeTracker
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.tiling.areas import Area, Interval
from steadyvsr.models.tiling.job import NotFinite
from steadyvsr.models.wan_vae import (
    StreamingDecoder,
    TiledDecode,
    TiledEncode,
    WanVAE,
    decode_tiled,
    encode_tiled,
    peak_bytes,
)

DATA = Path(__file__).parents[1] / "data"
DIM = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(dim=DIM).double()


def random_latents(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, 16, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def random_frames(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(1, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(2)) * 2 - 1


def run(job, on_step=lambda: None) -> torch.Tensor:
    while job.done < job.total:
        job.advance(on_step)
    return job.result


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape and expected.std() > 1e-3
    return float((result - expected).norm() / expected.norm())


# Plans


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([1, 8]))
def test_parts_cover_an_axis_once_in_steps_with_sizes_that_differ_by_one_step(steps, side, step):
    axis = Interval(0, steps * step, steps * step)
    parts = axis.parts(side, step)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == axis.stop
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= max(side, step) and max(sizes) - min(sizes) <= step and min(sizes) > 0
    assert all(size % step == 0 for size in sizes)


@pytest.mark.parametrize(("of_decoder", "before", "after"), [(True, 7, 7), (False, 29, 36)])
def test_a_tile_reads_7_latents_or_29_and_36_pixels_around_it_as_far_as_the_frame_goes(vae, of_decoder, before, after):
    network = vae.decoder if of_decoder else vae.encoder
    inner, length, scale = ((640, 704), 1600, 1 / 8) if of_decoder else ((80, 88), 200, 8)
    middle = Interval(*inner, length)
    corner = Interval(0, inner[1] - inner[0], inner[1] - inner[0])
    read = network.local_areas(Area(middle, corner))[0]
    assert read.rows[:2] == (inner[0] * scale - before, inner[1] * scale + after)
    assert read.columns[:2] == (0, corner.stop * scale)


# The same numbers


def test_encode_tiled_and_decode_tiled_give_what_the_whole_frame_gives(vae):
    frames = random_frames(5, 48, 64)
    latents = encode_tiled(vae, frames, tile=32)
    assert error(latents, vae.encode(frames)) < 1e-10
    assert error(decode_tiled(vae, latents, tile=32), vae.decode(latents)) < 1e-10
    assert error(decode_tiled(vae, 9 * latents), vae.decode(9 * latents)) < 1e-10  # clamped


def test_encode_tiled_and_decode_tiled_refuse_what_the_whole_frame_refuses(vae):
    with pytest.raises(ValueError, match="Wan VAE: expected 4k\\+1 frames of a height and width that 8 divides"):
        encode_tiled(vae, random_frames(4, 16, 16))
    with pytest.raises(ValueError, match="Wan VAE: expected latents NCTHW with 16 channels"):
        decode_tiled(vae, random_frames(1, 2, 2))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(8, 130))
def test_tiles_give_what_the_whole_frame_gives(vae, latents, rows, columns, tile):
    z, frames = random_latents(latents, rows, columns), random_frames(4 * latents - 3, 8 * rows, 8 * columns)
    decode = TiledDecode(vae, z, tile, device=CPU, dtype=torch.float64)
    encode = TiledEncode(vae, frames, tile, device=CPU, dtype=torch.float64)
    assert error(run(decode), vae.decode(z)) < 1e-10
    assert error(run(encode), vae.encode(frames)) < 1e-10


@pytest.mark.parametrize("latents", range(1, 14))
def test_single_precision_stays_within_a_ten_thousandth_for_every_length(latents):
    torch.manual_seed(0)
    vae = WanVAE(dim=DIM)
    z = random_latents(latents, 5, 6, dtype=torch.float32)
    frames = random_frames(4 * latents - 3, 40, 48, dtype=torch.float32)
    decode = TiledDecode(vae, z, 16, device=CPU, dtype=torch.float32)
    encode = TiledEncode(vae, frames, 16, device=CPU, dtype=torch.float32)
    assert decode.total == encode.total == 10  # nine tiles, and the stages that see the whole frame
    assert error(run(decode), vae.decode(z)) < 1e-4
    assert error(run(encode), vae.encode(frames)) < 1e-4


@pytest.mark.parametrize(("lost", "same"), [(0, True), (1, False)])
def test_one_pixel_less_around_a_tile_would_change_it(vae, lost, same):
    """What lies beyond the reach is spoiled, and what lies at its edge: only the second is noticed."""
    frames = random_frames(5, 8, 240)
    area = Area(Interval(0, 8, 8), Interval(80, 160, 240))
    encode = TiledEncode(vae, frames, 80, device=CPU, dtype=torch.float64)
    left, right = area.columns.start - 29 + lost, area.columns.stop + 36 - lost
    spoiled = frames.clone()
    spoiled[..., :left] = spoiled[..., right:] = 0.3
    local = {}
    for name, clip in (("whole", frames), ("spoiled", spoiled)):
        encode = TiledEncode(vae, clip, 80, device=CPU, dtype=torch.float64)
        encode.advance(lambda: None)
        encode.advance(lambda: None)  # the second tile is the middle one
        local[name] = torch.cat(encode._features, 2)[..., 10:20]
    assert (float((local["whole"] - local["spoiled"]).abs().max()) <= 1e-9) is same


@pytest.mark.parametrize(("lost", "same"), [(0, True), (1, False)])
def test_one_latent_less_around_a_tile_would_change_it(vae, lost, same):
    z = random_latents(2, 1, 30)
    frames = {}
    for name in ("whole", "spoiled"):
        decode = TiledDecode(vae, z, 80, device=CPU, dtype=torch.float64)
        decode.advance(lambda: None)
        if name == "spoiled":
            for features in decode._features:
                features[..., : 10 - 7 + lost] = features[..., 20 + 7 - lost :] = 0.3
        decode.advance(lambda: None)
        decode.advance(lambda: None)
        frames[name] = decode.result[..., 80:160]
    assert (float((frames["whole"] - frames["spoiled"]).abs().max()) <= 1e-9) is same


def test_the_golden_vectors_are_met_in_tiles():
    """The tolerance is that of the set."""
    golden = {key: value.float() for key, value in load_file(DATA / "wan_vae_golden.safetensors").items()}
    vae = WanVAE.from_state_dict({k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")})
    encode = TiledEncode(vae, golden["in/video"], 32, device=CPU, dtype=torch.float32)
    assert encode.total > 2
    torch.testing.assert_close(run(encode), golden["out/encode17"], rtol=2e-4, atol=1e-4)
    decode = TiledDecode(vae, golden["in/latents"], 32, device=CPU, dtype=torch.float32)
    assert decode.total > 2
    torch.testing.assert_close(run(decode)[:, :, :5], golden["out/decode5_first5_frames"], rtol=2e-4, atol=1e-4)


# A job


def test_clips_of_a_batch_are_computed_one_after_another(vae):
    z = torch.cat([random_latents(2, 4, 5), -random_latents(2, 4, 5)])
    job = TiledDecode(vae, z, 16, device=CPU, dtype=torch.float64)
    assert job.total == 2 * 7
    assert error(run(job), vae.decode(z)) < 1e-10
    frames = torch.cat([random_frames(5, 32, 40), -random_frames(5, 32, 40)])
    assert error(run(TiledEncode(vae, frames, 16, device=CPU, dtype=torch.float64)), vae.encode(frames)) < 1e-10


@pytest.mark.parametrize("fails_at", range(7))
@pytest.mark.parametrize("kind", [TiledDecode, TiledEncode])
def test_a_unit_that_raised_is_tried_again_in_smaller_tiles_with_the_same_result(vae, kind, fails_at):
    clip, whole = (
        (random_latents(2, 4, 5), vae.decode) if kind is TiledDecode else (random_frames(5, 32, 40), vae.encode)
    )
    job = kind(vae, clip, 16, device=CPU, dtype=torch.float64)
    for _ in range(fails_at):
        job.advance(lambda: None)
    done = job.done

    def out_of_memory() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        job.advance(out_of_memory)
    assert job.done == done == fails_at
    before = job.total
    job.cut(8)
    tiles_left = fails_at < (7 if kind is TiledDecode else 6)
    assert (job.total > before) is tiles_left
    assert error(run(job), whole(clip)) < 1e-10


def test_progress_counts_units_and_ends_at_the_total(vae):
    job = TiledEncode(vae, random_frames(5, 32, 40), 16, device=CPU, dtype=torch.float64)
    seen = []
    while job.done < job.total:
        seen.append((job.done, job.total))
        job.advance(lambda: None)
    assert seen == [(i, 7) for i in range(7)]
    with pytest.raises(RuntimeError, match="done"):
        job.advance(lambda: None)


def test_not_a_number_is_named_with_its_place_and_type(vae):
    z = random_latents(2, 4, 4)
    z[0, 0, 1, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"stage of the whole frame, latent 1, computed in float64"):
        run(TiledDecode(vae, z, 16, device=CPU, dtype=torch.float64))
    frames = random_frames(5, 32, 32)
    frames[0, 0, 3, 31, 31] = float("inf")
    job = TiledEncode(vae, frames, 16, device=CPU, dtype=torch.float64)
    with pytest.raises(NotFinite, match=r"rows 0–16, columns 0–16, frames 1–5"):
        run(job)


def test_features_of_a_tile_that_fits_no_fp16_are_kept_in_the_format_they_were_computed_in(vae):
    """The last block before the features gives huge numbers in one tile: infinity in fp16, a number in fp32."""
    frames = random_frames(5, 32, 32)
    calls = []

    def loud(module, inputs, output):
        calls.append(output.dtype)
        return output * 1e9 if len(calls) == 3 or output.dtype == torch.float32 else output

    job = TiledEncode(vae, frames, 16, device=CPU, dtype=torch.float16)
    handle = vae.encoder.downsamples[8].register_forward_hook(loud)
    try:
        job.advance(lambda: None)
        with pytest.raises(NotFinite, match="float16"):
            job.advance(lambda: None)
        job.dtype = torch.float32
        job.advance(lambda: None)
        job.dtype = torch.float16
        while job.total - job.done > 1:
            job.advance(lambda: None)
    finally:
        handle.remove()
    job.dtype = torch.float32
    assert run(job).isfinite().all()


# Memory


def test_no_layer_sees_more_pixels_than_a_tile_and_its_surroundings(vae):
    """At full resolution; what has latent resolution is 64 times smaller."""
    seen = []
    z = random_latents(2, 30, 30)

    def spy(module, inputs) -> None:
        seen.append(inputs[0].shape[-2] * inputs[0].shape[-1])

    decoder = [block.register_forward_pre_hook(spy) for block in vae.decoder.upsamples[12:]]
    encoder = [block.register_forward_pre_hook(spy) for block in vae.encoder.downsamples[:3]]
    try:
        run(TiledDecode(vae, z, 64, device=CPU, dtype=torch.float64))
        in_decoder = max(seen)
        seen.clear()
        run(TiledEncode(vae, random_frames(5, 240, 240), 64, device=CPU, dtype=torch.float64))
        assert 64 * 64 <= in_decoder <= (64 + 14) ** 2 and 64 * 64 <= max(seen) <= (64 + 29 + 36) ** 2
    finally:
        for handle in decoder + encoder:
            handle.remove()


def test_between_units_nothing_is_held_but_features_and_result():
    torch.manual_seed(0)
    vae = WanVAE(dim=DIM)
    job = TiledDecode(vae, random_latents(3, 8, 8, dtype=torch.float32), 32, device=CPU, dtype=torch.float32)
    with StorageTracker() as tracker:
        job.advance(lambda: None)
        gc.collect()
        features = 3 * 4 * DIM * 8 * 8 * 4
        assert tracker.peak > tracker.now == features
        job.advance(lambda: None)
        gc.collect()
        assert tracker.now == features


@pytest.mark.parametrize("latents", [1, 2, 3])
@pytest.mark.parametrize(("kind", "encodes"), [(TiledDecode, False), (TiledEncode, True)])
def test_the_predicted_peak_bounds_what_a_job_makes_at_once(kind, encodes, latents):
    """Computed for real on the CPU at a sixth of the released width; results and what waits there count as well."""
    vae = WanVAE(dim=16)
    size = (128, 128)
    shape = (3, 4 * latents - 3, *size) if encodes else (16, latents, 16, 16)
    clip = torch.zeros(1, *shape)
    expected = peak_bytes(vae, encodes=encodes, latents=latents, size=size, tile=64, itemsize=4)
    job = kind(vae, clip, 64, device=CPU, dtype=torch.float32)
    with StorageTracker(vae.parameters()) as tracker:
        run(job)
    assert 0.3 * expected < tracker.peak < 1.1 * expected


PREDICTED = [(1, (192, 192), 64), (2, (64, 72), 64), (3, (128, 64), 64), (3, (64, 104), 256)]


@pytest.mark.parametrize(("latents", "size", "tile"), PREDICTED)
@pytest.mark.parametrize(("kind", "encodes"), [(TiledDecode, False), (TiledEncode, True)])
def test_the_predicted_peak_is_the_counted_one_at_the_released_width(kind, encodes, latents, size, tile, monkeypatch):
    """Run whole over tensors of the meta device: nothing is computed, but tensors live and die."""
    with torch.device("meta"):
        vae = WanVAE(dim=96).bfloat16()
    height, width = size
    shape = (3, 4 * latents - 3, height, width) if encodes else (16, latents, height // 8, width // 8)
    # The check for NaN has nothing to look at here, and its mask would count.
    monkeypatch.setattr(kind, "_finite", lambda self, x, where: x)
    with torch.inference_mode(), ShapeTracker(vae.parameters()) as tracker:
        run(kind(vae, torch.zeros(1, *shape), tile, device="meta", dtype=torch.bfloat16))
    expected = peak_bytes(vae, encodes=encodes, latents=latents, size=size, tile=tile, itemsize=2)
    assert 0.99 * tracker.peak <= expected <= 1.1 * tracker.peak


@given(st.integers(1, 4), st.integers(2, 90), st.integers(2, 90), st.integers(2, 64), st.booleans())
@settings(deadline=None)
def test_a_longer_clip_is_never_predicted_to_take_less(vae, latents, rows, columns, tile, encodes):
    size = (8 * rows, 8 * columns)

    def predicted(latents: int, tile: int) -> int:
        return peak_bytes(vae, encodes=encodes, latents=latents, size=size, tile=tile, itemsize=2)

    assert 0 < predicted(latents, 8 * tile) <= predicted(latents + 1, 8 * tile)
    if tile >= max(rows, columns):
        assert predicted(latents, 8 * tile) == predicted(latents, 16 * tile)


# Streams


@pytest.mark.parametrize("rests", [None, CPU])
@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [2, 2], [4]])
def test_a_stream_in_tiles_gives_what_the_whole_frame_gives(vae, parts, rests):
    z = random_latents(4, 5, 6)
    decoder = StreamingDecoder(vae, tile=16)
    cache = decoder.new_cache(rests)
    frames = [decoder.decode_stream(part, cache) for part in z.split(parts, dim=2)]
    assert len(cache.tiles) == 9
    assert error(torch.cat(frames, 2).clamp(-1, 1), vae.decode(z)) < 1e-10


def test_a_stream_goes_on_from_a_copy_of_its_cache_after_an_exception(vae):
    z, decoder = random_latents(3, 4, 4), StreamingDecoder(vae, tile=16)
    kept = decoder.new_cache()
    first = decoder.decode_stream(z[:, :, :1], kept)
    handle = vae.decoder.head["2"].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    spoiled = decoder.copy_cache(kept)
    try:
        with pytest.raises(MemoryError):
            decoder.decode_stream(z[:, :, 1:], spoiled)
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match="interrupted"):
        decoder.decode_stream(z[:, :, 1:], spoiled)
    rest = decoder.decode_stream(z[:, :, 1:], decoder.copy_cache(kept))
    assert error(torch.cat([first, rest], 2).clamp(-1, 1), vae.decode(z)) < 1e-10
