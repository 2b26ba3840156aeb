"""The Wan 2.1 VAE: golden vectors, streaming, and what its cache holds."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from steadyvsr.models.tiling.areas import Area
from steadyvsr.models.wan_vae import CausalCache, WanVAE, layers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DATA = Path(__file__).parents[1] / "data"
DIM = 4
HEIGHT, WIDTH = 16, 24
LATENT_HEIGHT, LATENT_WIDTH = HEIGHT // 8, WIDTH // 8


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(DATA / "wan_vae_golden.safetensors").items()}


@pytest.fixture(scope="module")
def golden_weights(golden) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weights/"): value for key, value in golden.items() if key.startswith("weights/")}


@pytest.fixture(scope="module")
def golden_vae(golden_weights) -> WanVAE:
    return WanVAE.from_state_dict(golden_weights)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(dim=DIM)


def random_frames(count: int) -> torch.Tensor:
    return torch.rand(1, 3, count, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(count: int) -> torch.Tensor:
    return torch.randn(1, 16, count, LATENT_HEIGHT, LATENT_WIDTH, generator=torch.Generator().manual_seed(2))


def decode_in_parts(vae: WanVAE, latents: torch.Tensor, parts: list[int]) -> torch.Tensor:
    cache, frames = None, []
    for part in latents.split(parts, dim=2):
        decoded, cache = vae.decode_with_cache(part, cache)
        frames.append(decoded)
    return torch.cat(frames, dim=2)


# Golden vectors (tolerance of the set: rtol 2e-4, atol 1e-4)


def assert_golden(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-4)


def test_encode_gives_the_golden_latents(golden, golden_vae):
    latents = golden_vae.encode(golden["in/video"])
    assert_golden(latents, golden["out/encode17"])
    assert_golden(golden_vae.denormalise(latents), golden["ref/encode17_raw_mu"])


def test_decode_gives_the_golden_frames(golden, golden_vae):
    frames = golden_vae.decode(golden["in/latents"])
    assert frames.shape == (1, 3, 17, 64, 96)
    assert_golden(frames[:, :, :5], golden["out/decode5_first5_frames"])


def test_decode_with_cache_gives_the_golden_unclamped_frames(golden, golden_vae):
    frames = decode_in_parts(golden_vae, golden["in/latents"], [1, 2, 2])
    assert frames.abs().max() > 1
    assert_golden(frames[..., ::3, ::3], golden["out/decode5_unclamped_sub"])


# Streaming


@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [3, 1], [1, 3], [2, 2]])
def test_decode_with_cache_equals_decode_bit_for_bit(vae, parts):
    latents = random_latents(4)
    assert torch.equal(decode_in_parts(vae, latents, parts).clamp(-1, 1), vae.decode(latents))


@pytest.mark.parametrize("parts", [[1, 4, 4, 4], [5, 8], [9, 4]])
def test_encode_with_cache_equals_encode_bit_for_bit(vae, parts):
    frames = random_frames(13)
    cache, latents = None, []
    for part in frames.split(parts, dim=2):
        encoded, cache = vae.encode_with_cache(part, cache)
        latents.append(encoded)
    assert torch.equal(torch.cat(latents, dim=2), vae.encode(frames))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_latents_decode_to_the_first_frames(vae, count):
    latents = random_latents(4)
    assert torch.equal(vae.decode(latents[:, :, :count]), vae.decode(latents)[:, :, : 4 * count - 3])


@pytest.mark.parametrize("count", [1, 5, 9])
def test_fewer_frames_encode_to_the_first_latents(vae, count):
    frames = random_frames(13)
    assert torch.equal(vae.encode(frames[:, :, :count]), vae.encode(frames)[:, :, : (count + 3) // 4])


def test_a_batch_decodes_and_encodes_like_its_clips(vae):
    latents = torch.cat([random_latents(2), -random_latents(2)])
    torch.testing.assert_close(vae.decode(latents)[1:], vae.decode(latents[1:]))
    frames = torch.cat([random_frames(5), -random_frames(5)])
    torch.testing.assert_close(vae.encode(frames)[1:], vae.encode(frames[1:]))


def test_two_streams_do_not_mix(vae):
    latents = random_latents(3)
    _, first = vae.decode_with_cache(latents[:, :, :2])
    vae.decode_with_cache(-latents)
    frames, _ = vae.decode_with_cache(latents[:, :, 2:], first)
    assert torch.equal(frames.clamp(-1, 1), vae.decode(latents)[:, :, 5:])


def whole_local_stage(network):
    """The local stage of an encoder or decoder over the whole frame."""
    times = 1 / 8 if hasattr(network, "downsamples") else 8

    def stage(x, cache):
        return network.local_stage(x, cache, Area.whole(*(int(side * times) for side in x.shape[-2:])))

    return stage


def test_stages_with_a_cache_each_equal_the_whole_decoder_and_encoder(vae):
    for network, local_first, chunks in (
        (vae.decoder, False, torch.randn(1, 16, 3, 2, 3).split(1, dim=2)),
        (vae.encoder, True, random_frames(9).split([1, 4, 4], dim=2)),
    ):
        stages = [whole_local_stage(network), network.global_stage]
        stages = stages if local_first else stages[::-1]
        whole, caches = CausalCache(), [CausalCache(), CausalCache()]
        for chunk in chunks:
            with whole.chunk():
                expected = network(chunk, whole)
            for stage, cache in zip(stages, caches, strict=True):
                with cache.chunk():
                    chunk = stage(chunk, cache)
            assert torch.equal(chunk, expected)


def last_of_stream(stage, clip: torch.Tensor, parts: list[int]) -> torch.Tensor:
    cache = CausalCache()
    for chunk in clip.split(parts, dim=2):
        with cache.chunk():
            result = stage(chunk, cache)
    return result


def test_the_local_stage_of_the_decoder_reaches_fifty_pixels(vae):
    """50 pixels need 7 latents of halo."""
    features = torch.randn(1, 4 * DIM, 2, 1, 24)
    changed = features.clone()
    changed[..., 12] += 1
    frames, others = (last_of_stream(whole_local_stage(vae.decoder), clip, [1, 1]) for clip in (features, changed))
    touched = (frames != others).flatten(0, 3).any(0).nonzero()
    assert 12 * 8 - touched.min() == touched.max() - (12 * 8 + 7) == 50


def test_the_local_stage_of_the_encoder_reaches_29_pixels_back_and_36_ahead():
    torch.manual_seed(0)
    encoder = WanVAE(dim=DIM).double().encoder
    frames = torch.rand(1, 3, 5, 8, 120, dtype=torch.float64)
    features = last_of_stream(whole_local_stage(encoder), frames, [1, 4])
    reach = {}
    for pixel in (56 - 30, 56 - 29, 63 + 36, 63 + 37):  # latent 7 stands for pixels 56…63
        changed = frames.clone()
        changed[..., pixel] += 0.5
        others = last_of_stream(whole_local_stage(encoder), changed, [1, 4])
        reach[pixel] = not torch.equal(others[..., 7], features[..., 7])
    assert list(reach.values()) == [False, True, True, False]


# Cache and memory


def test_caches_own_exactly_their_storage_and_keep_their_size(vae):
    for step, clip, first, later in (
        (vae.decode_with_cache, random_latents(4), 1, 1),
        (vae.encode_with_cache, random_frames(13), 1, 4),
    ):
        cache, sizes = None, []
        for part in clip.split([first, later, later, later], dim=2):
            _, cache = step(part, cache)
            for past in cache.frames:
                assert past.untyped_storage().nbytes() == past.numel() * past.element_size()
            sizes.append(sum(past.numel() for past in cache.frames))
        assert len(set(sizes)) == 1


def test_a_stream_lets_go_of_the_past_that_the_next_chunk_replaced(vae):
    latents = random_latents(2)
    _, cache = vae.decode_with_cache(latents[:, :, :1])
    old = [weakref.ref(past) for past in cache.frames]
    vae.decode_with_cache(latents[:, :, 1:], cache)
    assert [ref() for ref in old] == [None] * len(old)


def test_the_module_holds_no_tensor_but_its_weights(vae):
    before = set(vars(vae)), list(vae.state_dict())
    vae.decode(random_latents(2))
    vae.encode(random_frames(5))
    assert (set(vars(vae)), list(vae.state_dict())) == before
    assert not [v for m in vae.modules() for v in vars(m).values() if isinstance(v, torch.Tensor | CausalCache)]


class PeakBytes(TorchDispatchMode):
    """Largest sum of storages alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known | given:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return result

    def _release(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def test_memory_of_a_stream_does_not_grow_with_the_clip():
    with torch.device("meta"):
        vae = WanVAE(dim=DIM)
        latents, frames = torch.empty(1, 16, 1, 8, 8), torch.empty(1, 3, 4, 64, 64)
    peaks = {}
    for count in (3, 6):
        with PeakBytes() as memory:
            decoder_cache = encoder_cache = None
            vae_input = frames[:, :, :1]
            for _ in range(count):
                _, decoder_cache = vae.decode_with_cache(latents, decoder_cache)
                _, encoder_cache = vae.encode_with_cache(vae_input, encoder_cache)
                vae_input = frames
        peaks[count] = memory.peak
    assert peaks[6] == peaks[3] > 0


def test_memory_of_decode_grows_by_its_input_and_output_alone():
    with torch.device("meta"):
        vae = WanVAE(dim=DIM)
    peaks = {}
    for count in (3, 6):
        latents = torch.empty(1, 16, count, 8, 8, device="meta")
        with PeakBytes() as memory:
            frames = vae.decode(latents)
        peaks[count] = memory.peak - frames.untyped_storage().nbytes()
    assert peaks[6] == peaks[3] > 0


def test_peak_memory_of_the_released_size_per_pixel():
    """Live elements per pixel of a 256x256 frame, weights excluded: 3721 and 2760 on torch 2.13."""
    with torch.device("meta"):
        vae = WanVAE().bfloat16()
        latents = torch.empty(1, 16, 1, 32, 32, dtype=torch.bfloat16)
        frames = torch.empty(1, 3, 4, 256, 256, dtype=torch.bfloat16)
    decoder_cache = encoder_cache = None
    with PeakBytes() as decoding:
        for _ in range(3):
            _, decoder_cache = vae.decode_with_cache(latents, decoder_cache)
    with PeakBytes() as encoding:
        for part in (frames[:, :, :1], frames, frames):
            _, encoder_cache = vae.encode_with_cache(part, encoder_cache)
    elements = 256 * 256 * torch.bfloat16.itemsize
    assert decoding.peak / elements < 3750
    assert encoding.peak / elements < 2800


def test_decode_keeps_no_past_of_the_last_latent():
    with torch.device("meta"):
        vae = WanVAE(dim=DIM)
    latents = torch.empty(1, 16, 1, 8, 8, device="meta")
    with PeakBytes() as whole:
        vae.decode(latents)
    with PeakBytes() as stream:
        vae.decode_with_cache(latents)
    assert whole.peak < 0.5 * stream.peak


def test_no_gradient_is_recorded_and_the_callers_mode_stays(vae):
    with torch.enable_grad():
        frames, cache = vae.decode_with_cache(random_latents(2).requires_grad_())
        latents = vae.encode(random_frames(5).requires_grad_())
        assert torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in (frames, latents, *cache.frames))


def test_an_interrupted_cache_is_empty_and_refused(vae):
    _, cache = vae.decode_with_cache(random_latents(1))
    with pytest.raises(KeyboardInterrupt), cache.chunk():
        raise KeyboardInterrupt
    assert not cache.frames
    with pytest.raises(RuntimeError, match="Start again with cache=None"):
        vae.decode_with_cache(random_latents(1), cache)


# Device and dtype follow the input


def test_bf16_is_finite_and_close_to_fp32(golden, golden_weights, golden_vae):
    vae = WanVAE.from_state_dict(golden_weights).bfloat16()
    frames, _ = vae.decode_with_cache(golden["in/latents"][:, :, :3].bfloat16())
    latents = vae.encode(golden["in/video"][:, :, :9].bfloat16())
    assert frames.dtype == latents.dtype == torch.bfloat16
    reference, _ = golden_vae.decode_with_cache(golden["in/latents"][:, :, :3])
    assert (frames - reference).norm() < 0.05 * reference.norm()
    reference = golden_vae.encode(golden["in/video"][:, :, :9])
    assert (latents - reference).norm() < 0.05 * reference.norm()


def test_float64_agrees_with_fp32(vae):
    frames, latents = random_frames(5), random_latents(2)
    torch.testing.assert_close(vae.encode(frames.double()), vae.encode(frames).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents.double()), vae.decode(latents).double(), rtol=1e-4, atol=1e-5)


def test_weights_of_another_dtype_are_cast_where_they_are_used(golden, golden_weights, golden_vae):
    stored = WanVAE.from_state_dict({key: value.half() for key, value in golden_weights.items()})
    latents, frames = golden["in/latents"][:, :, :2, :4, :4], golden["in/video"][:, :, :5, :32, :32]
    assert torch.equal(stored.decode(latents), golden_vae.decode(latents))
    assert torch.equal(stored.encode(frames), golden_vae.encode(frames))
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}


class NoMixedDevices(TorchDispatchMode):
    """Refuses what a GPU refuses: one operation on tensors of two devices. (The meta device alone lets it pass.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) <= 1, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


def test_weights_on_another_device_are_brought_to_the_input(vae):
    frames, latents = random_frames(5).to("meta"), random_latents(2).to("meta")
    with NoMixedDevices():
        assert vae.encode(frames).device.type == vae.decode(latents).device.type == "meta"
    assert {parameter.device.type for parameter in vae.parameters()} == {"cpu"}


def test_normalisation_of_a_black_pixel_is_zero_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        black = torch.zeros(1, 8, 2, 2, dtype=dtype)
        assert torch.equal(layers.RMSNorm(8, 2)(black), black)


def test_attention_in_blocks_of_queries_equals_attention_at_once(vae, monkeypatch):
    frame = torch.randn(1, 4 * DIM, 2, 5, 5)
    attention = vae.decoder.middle[1]
    area = Area.whole(5, 5)
    whole = attention(frame, CausalCache(), area)
    monkeypatch.setattr(layers, "ATTENTION_SCORES", 7 * 25)
    torch.testing.assert_close(attention(frame, CausalCache(), area), whole)


# Wrong input


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 2, 16, 16), (1, 3, 0, 16, 16), (1, 3, 1, 12, 16), (1, 3, 1, 16, 20), (1, 4, 1, 16, 16), (3, 1, 16, 16)],
)
def test_frames_of_a_wrong_shape_are_refused(vae, shape):
    with pytest.raises(ValueError, match="Wan VAE: expected"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 1, 2, 2), (1, 16, 0, 2, 2), (16, 1, 2, 2)])
def test_latents_of_a_wrong_shape_are_refused(vae, shape):
    with pytest.raises(ValueError, match="Wan VAE: expected latents NCTHW"):
        vae.decode(torch.zeros(shape))


def test_later_chunks_of_an_encoded_stream_hold_whole_latents(vae):
    _, cache = vae.encode_with_cache(random_frames(1))
    with pytest.raises(ValueError, match="expected 4k frames"):
        vae.encode_with_cache(random_frames(5), cache)


def test_statistics_must_fit_the_latent_channels():
    with pytest.raises(ValueError, match="latents_mean"):
        WanVAE(dim=DIM, z_dim=4)
