"""Projection, rotary angles, decoder and cast-on-use layers, each alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from steadyvsr.app.card.random_model import TINY, parameters, tiny_model
from steadyvsr.models import operations
from steadyvsr.models.flashvsr import BufferLQ4xProjection, StreamOptions, TCDecoder, tc_decoder, upscale_frames
from steadyvsr.models.flashvsr.rotary import rotate, rotation
from steadyvsr.models.flashvsr.windows import Grid, patchify, to_windows, unpatchify
from torch import Tensor, nn

CLIP_RANGES = [(0, 1), *((i, i + 4) for i in range(1, 25, 4))]


def video(frames: int = 25, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streamed(projection: nn.Module, clip: Tensor) -> tuple[Tensor, object]:
    tokens, cache = [], None
    for start, stop in CLIP_RANGES:
        found, cache = projection(clip[:, :, start:stop], cache)
        assert (found is None) == (start == 0)
        tokens += [] if found is None else [found[0]]
    return torch.cat(tokens, 1), cache


def test_the_fixed_buffer_projection_is_the_causal_one_bit_for_bit() -> None:
    buffer, causal = tiny_model("v1").lq_projection, tiny_model("v1.1").lq_projection
    assert torch.equal(buffer(video())[0][0], causal(video())[0][0])
    assert torch.equal(streamed(buffer, video())[0], streamed(causal, video())[0])


@pytest.mark.parametrize("order", ["fixed", "as_trained"])
def test_a_projection_streamed_equals_the_whole_clip(order: str) -> None:
    projection = tiny_model("v1", cache_order=order).lq_projection
    whole, _ = projection(video())
    torch.testing.assert_close(streamed(projection, video())[0], whole[0], rtol=1e-5, atol=1e-5)


def test_as_trained_has_no_memory_between_clips_and_fixed_has() -> None:
    other = video()
    other[:, :, :5] = video(5, seed=1)
    tokens = 2 * 3
    for order, remembers in (("fixed", True), ("as_trained", False)):
        projection = tiny_model("v1", cache_order=order).lq_projection
        first, second = (projection(clip)[0][0][:, tokens : 2 * tokens] for clip in (video(), other))
        assert torch.equal(first, second) != remembers


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_a_cache_keeps_no_graph_of_the_clips_before(version: str) -> None:
    """By hand, with gradients on, a stream would otherwise hold every clip that it has seen."""
    projection = tiny_model(version).lq_projection.requires_grad_(True)
    cache = None
    for start, stop in CLIP_RANGES[:3]:
        tokens, cache = projection(video()[:, :, start:stop], cache)
        assert not cache.pixels.requires_grad and not cache.features.requires_grad
    assert tokens[0].requires_grad


def test_the_caches_own_exactly_their_storage() -> None:
    _, cache = streamed(tiny_model().lq_projection, video())
    for tensor in (cache.pixels, cache.features):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_cuda_shaped_projection_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU the convolution is read as a two-dimensional one."""
    projection = tiny_model().lq_projection
    padded = torch.randn(1, 768, 6, 4, 5)
    expected = torch.nn.functional.conv3d(padded, projection.conv1.weight, projection.conv1.bias, stride=(2, 1, 1))
    weight, bias = projection.conv1.weight, projection.conv1.bias
    windows = padded.unfold(2, 4, 2).permute(0, 2, 1, 5, 3, 4).flatten(0, 1).flatten(1, 2)
    result = torch.nn.functional.conv2d(windows, weight.flatten(1, 2), bias).transpose(0, 1)[None]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [0, 2, 3])
def test_half_a_clip_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="4k \\+ 1 frames at the start"):
        BufferLQ4xProjection((8, 8), 32)(video()[:, :, :frames])


@pytest.mark.parametrize("step", [0, 1, 509, 510, 511, 512, 1099, 100_000])
def test_angles_equal_float64_at_any_position(step: int) -> None:
    """Other packs end at process step 509: their table of angles has 1,024 rows."""
    grid, head_dim = Grid(6 if step == 0 else 2, 8, 16), 128
    first = 0 if step == 0 else 4 + 2 * step
    x = torch.randn(grid.frames * 8 * 16, 1, head_dim, dtype=torch.float64)
    result = rotate(x.float(), *rotation(grid, first, head_dim, torch.device("cpu"))).double()
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    places[:, 0] += first
    places = to_windows(places[None], grid)[0]
    dims = (44, 42, 42)
    angles = torch.cat(
        [places[:, [axis]] / 10000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d) for axis, d in enumerate(dims)],
        1,
    )
    turned = torch.view_as_complex(x[:, 0].unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(result[:, 0], torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-5)


def test_unpatchify_undoes_the_window_order() -> None:
    grid = Grid(2, 8, 16)
    latent = torch.arange(16 * 2 * 16 * 32, dtype=torch.float32).view(1, 16, 2, 16, 32)
    patches = patchify(latent, grid).unflatten(-1, (16, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(patches, grid), latent)


def decoder_case() -> tuple[TCDecoder, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 10, 16, 8, 4, generator=generator)
    return tiny_model().decoder, latents, torch.rand(1, 37, 3, 64, 32, generator=generator) * 2 - 1


def test_the_decoder_in_chunks_equals_one_shot_bit_for_bit() -> None:
    decoder, latents, condition = decoder_case()
    whole, _ = decoder(latents, condition)
    first, memory = decoder(latents[:, :6], condition[:, :21])
    second, _ = decoder(latents[:, 6:], condition[:, 21:], memory)
    assert torch.equal(torch.cat([first, second], 1), whole)


def test_strips_of_the_last_stage_equal_the_whole_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, latents, condition = decoder_case()
    whole, _ = decoder(latents, condition)
    monkeypatch.setattr(tc_decoder, "CPU_STRIP_PIXELS", 32 * 6)
    torch.testing.assert_close(decoder(latents, condition)[0], whole, rtol=0, atol=1e-6)


def test_folded_transitions_equal_nearest_upsampling_and_two_convolutions() -> None:
    x, grow, conv = torch.randn(1, 5, 4, 6), torch.randn(10, 5, 1, 1), torch.randn(3, 5, 3, 3)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    grown = torch.nn.functional.conv2d(large, grow).unflatten(1, (2, 5))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for step, kernel in enumerate(tc_decoder.phase_kernels(grow, conv, 2)):
        expected = torch.nn.functional.conv2d(grown[:, step], conv, padding=1)
        torch.testing.assert_close(tc_decoder.upsample_phases(padded, kernel), expected, rtol=1e-4, atol=1e-4)


def test_a_condition_that_does_not_fit_is_refused() -> None:
    decoder, latents, condition = decoder_case()
    with pytest.raises(ValueError, match="TCDecoder: expected a condition"):
        decoder(latents, condition[:, :36])


class Elsewhere:
    """A namespace of layers whose weights stay in float64, as weights stay in RAM under a partial load."""

    used: list[str] = []

    @staticmethod
    def layer(kind: type[nn.Module]) -> type[nn.Module]:
        class Resting(kind):
            def forward(self, x: Tensor) -> Tensor:
                Elsewhere.used.append(kind.__name__)
                assert self.weight.dtype == torch.float64 != x.dtype
                return kind.forward(self, x)

        return Resting


def test_a_partial_load_gives_the_frames_of_a_full_load() -> None:
    names = ("Linear", "Conv2d", "Conv3d", "LayerNorm")
    namespace = SimpleNamespace(**{name: Elsewhere.layer(getattr(operations, name)) for name in names})
    clip = torch.rand(5, 16, 16, 3)
    partial = tiny_model(operations=namespace, dtype=torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in parameters(partial))
    Elsewhere.used.clear()
    options = StreamOptions(scale=2.0)
    resting = torch.stack(list(upscale_frames(partial, clip, options, dtype=torch.float32)))
    full = torch.stack(list(upscale_frames(tiny_model(), clip, options)))
    assert {"Linear", "Conv2d", "LayerNorm"} <= set(Elsewhere.used)
    torch.testing.assert_close(resting, full, rtol=0, atol=1e-6)


def test_linear_by_onednn_equals_torch_and_keeps_gradients() -> None:
    layer = operations.Linear(48, 24)
    x = torch.randn(3, 7, 48)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert layer(x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_networks_hold_weights_only() -> None:
    model = tiny_model()
    for network in (model.transformer, model.lq_projection, model.decoder):
        before = {name: id(value) for name, value in vars(network).items()}
        assert not list(network.buffers())
        list(upscale_frames(model, torch.rand(2, 16, 16, 3), StreamOptions(scale=2.0)))
        assert {name: id(value) for name, value in vars(network).items()} == before


def test_sizes_of_a_model_are_read_from_its_tensors() -> None:
    model = tiny_model()
    networks = (model.transformer, model.lq_projection, model.decoder)
    assert type(TINY).from_tensors(*(network.state_dict() for network in networks), num_heads=1) == TINY
