"""Trials: a network of ComfyUI is taken over only if our order of computing gives the result of its own."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import comfy.model_management as mm
import torch
from torch import Tensor, nn

from ...memory.process import shared
from ...models.tiling import NotFinite, TileJob
from .cast_weights import CastWeights

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative error of a trial, by dtype: rounding of two orders of computing, far below any other difference."""


def once(network: nn.Module, name: str, trial: Callable[[], str]) -> str:
    """What `trial` found, carried out once for a network and a name: empty, or how the two ways differ."""
    verdicts: WeakKeyDictionary[nn.Module, dict[str, str]] = shared("vae_trials", WeakKeyDictionary)
    known = verdicts.setdefault(network, {})
    if name not in known:
        known[name] = trial()
    return known[name]


def differs(
    what: str,
    both: Callable[[torch.dtype], tuple[Tensor, Tensor]],
    network: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Empty, or how two ways of computing the same thing differ.

    A result that is not finite in `dtype` says nothing about the two ways, so it is computed once more in fp32.

    Args:
        what: names the result in the answer.
        both: computes it both ways in a dtype: ours, then ComfyUI's.
        network: whose weights they use.
        device, dtype: of these weights.
    """
    weights, results = CastWeights(network, (device, dtype)), []
    widest = torch.promote_types(dtype, torch.float32)
    for tried in dict.fromkeys((dtype, widest)):
        weights.prepare(device, tried)
        try:
            weights.run(lambda tried=tried: results.extend(both(tried)))
        except NotFinite:
            continue
        ours, native = results[0], results[1].to(results[0])
        if ours.shape != native.shape:
            return f"{what} has shape {tuple(ours.shape)}, not {tuple(native.shape)}"
        error = float((ours - native).norm() / native.norm())
        return "" if error <= tolerance(device, tried) else f"{what} differs by {error:.1e} in {tried}"
    return f"{what} is not finite in {widest}"


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error that passes."""
    # Convolutions in fp32 use TF32 on newer cards, which rounds as fp16 does.
    rounded = torch.float16 if dtype == torch.float32 and device.type != "cpu" else dtype
    return TOLERANCE.get(rounded, 0.0)


def carried_out(job: TileJob) -> Tensor:
    """The result of a job, all of its tiles computed."""
    while job.done < job.total:
        job.advance(mm.throw_exception_if_processing_interrupted)
    return job.result
