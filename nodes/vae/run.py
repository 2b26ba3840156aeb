"""One tiled encode or decode inside ComfyUI: planned by measurement, made smaller when memory runs out, reported."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor, nn

from ...memory.reading import size_text
from ...models.tiling import THREE_GRIDS, BlendDecode, BlendEncode, NotFinite, TileJob
from ...patches import residency, versions
from ...patches.versions import empty_caches, is_out_of_memory, memory_errors
from .. import node_status
from ..attempts import UNLOAD_OTHERS, Attempts
from .cast_weights import CastWeights
from .exact import ExactPath, exact_path
from .ladder import ATTEMPT_COLUMNS, MIN_TILE, TileLadder, dtype_name, smaller_tiles
from .layout import compression
from .memory import TileMemory

log = logging.getLogger("steadyvsr.nodes")

AUTO, EXACT, BLEND = "auto", "exact", "blend"
SHRINK, ERROR = "shrink", "error"
SPOT, OFF = "spot", "off"
MAX_TILE = 512
SIDES = range(MAX_TILE, 0, -MIN_TILE)
"""Sides to choose from where the user chose none."""
NAMED_TILES = 3
"""How many tiles that were not finite the report names; the others are counted."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class TileOptions:
    """What the user chose.

    Attributes:
        tile: side in pixels; 0: the largest that is predicted, and then measured, to fit.
        overlap: of neighbouring tiles in pixels.
        mode: auto | exact | blend.
        budget_gb: GiB on the device, the VAE's weights included; 0: what is free.
        on_oom: shrink | error.
        allow_cpu: go to the CPU when everything else has failed.
        verify: spot compares a blended result with one more tile | off.
    """

    tile: int
    overlap: int
    mode: str
    budget_gb: float
    on_oom: str
    allow_cpu: bool
    verify: str

    def checked(self, node: str) -> TileOptions:
        """These options.

        Raises:
            ValueError: one is out of range; the message names it.
        """
        if self.tile != 0 and self.tile < MIN_TILE:
            raise ValueError(f"{node}: expected a tile_size of 0 or at least {MIN_TILE}; got {self.tile}.")
        for name, value in (("overlap", self.overlap), ("memory_budget_gb", self.budget_gb)):
            if value < 0:
                raise ValueError(f"{node}: expected {name} of at least 0; got {value}.")
        choices = {"mode": (AUTO, EXACT, BLEND), "on_oom": (SHRINK, ERROR), "verify": (SPOT, OFF)}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{node}: expected {name} of {', '.join(known)}; got {value!r}. Choose one of them.")
        return self


@dataclass
class TiledRun:
    """One execution of a tiled VAE node.

    Attributes:
        node: display name, which errors begin with.
        vae: a ComfyUI VAE object that `layout.checked_vae` has accepted.
        encodes: whether to encode or to decode.
        node_id: of the node in the graph, for the progress bar.
    """

    node: str
    vae: Any
    encodes: bool
    options: TileOptions
    node_id: str | None
    notes: list[str] = field(default_factory=list)
    _exact: ExactPath | None = None
    _attempts: Attempts = field(init=False)
    _again: list[str] = field(default_factory=list)
    _report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._attempts = Attempts(self.node, ATTEMPT_COLUMNS)

    def run(self, source: Tensor) -> Tensor:
        """Encodes pixels 0..1 or decodes latents, NCHW or NCTHW; the result is fp32 on the CPU, pixels in 0..1.

        Raises:
            ValueError: the source does not suit the VAE, or a tile is not finite in fp32 either.
            mm.OOM_EXCEPTION: nothing was left to try.
        """
        started = time.perf_counter()
        memory = TileMemory(
            self.vae, self._pixels(source), self.options.budget_gb, lambda side: self._predicted(source, side)
        )
        with versions.device_context(self.vae.device), memory.running("VAE encode" if self.encodes else "VAE decode"):
            too_large = self._load(memory, MIN_TILE)
            self._exact = None if too_large else self._exact_path(source)
            tile, overlap = self._first_tile(memory)
            too_large = too_large or self._load(memory, tile)
            job = self._making_room(lambda: self._job(source, tile, overlap), memory)
            weights = CastWeights(self.vae.first_stage_model, (self.vae.device, self.vae.vae_dtype))
            ladder = self._ladder(job, weights, memory, source, untried=bool(too_large) and self._exact is None)
            if too_large:
                ladder.without_own_weights(too_large)
            try:
                self._carry_out(ladder, memory, source)
            except RuntimeError as error:
                # From torch, or from a VAE that checks its input; the one cause known here is a mismatch of channels.
                self._explain_channels(source, error)
                raise
            self._note_again()
            result = self._making_room(partial(self._finished, job), memory)
            place = f"{job.tile} px, {dtype_name(job.dtype)}, {job.device}"
            self._describe(source, job, result, ladder)
            del job, ladder, weights
        kept = result.nbytes if self.vae.output_device == self.vae.device != torch.device("cpu") else 0
        self._report |= {"memory": memory.report(kept), "seconds": round(time.perf_counter() - started, 3)}
        self._report |= memory.verdict(kept)
        log.info("%s: %s; %s", self.node, place, self._report["verified_reason"])
        node_status.send(self.node_id, memory=memory.summary(self._report["attempts"]))
        return result

    def report(self) -> dict[str, Any]:
        """What was done and measured, as plain values."""
        return {
            "node": self.node,
            "vae": type(self.vae.first_stage_model).__name__,
            **self._report,
            "notes": self.notes,
        }

    @property
    def _compression(self) -> int:
        return compression(self.vae.downscale_ratio if self.encodes else self.vae.upscale_ratio)

    def _pixels(self, source: Tensor) -> tuple[int, int]:
        """Height and width of the image."""
        factor = 1 if self.encodes else self._compression
        return source.shape[-2] * factor, source.shape[-1] * factor

    def _load(self, memory: TileMemory, tile: int) -> str:
        """Has the weights put on the device, without the other models there if need be.

        Returns:
            "", or why they are not there: what was expected, and what there was.
        """
        while True:
            try:
                memory.load(tile)
                return ""
            except memory_errors() as error:
                if not is_out_of_memory(error):
                    raise
                words = str(error)
            # Outside the handler: the traceback holds what was being copied.
            gc.collect()
            empty_caches()
            free, need = memory.read().free, self.vae.patcher.model_size()
            if self.options.on_oom != SHRINK or not self._unload_others():
                self._report.setdefault(
                    "mode_reason", "its weights do not fit on the device, where they would be tried"
                )
                return f"expected {size_text(need)} for the weights; got {size_text(free)} free: {words}"
            place = {"dtype": dtype_name(self.vae.vae_dtype), "device": str(self.vae.device)}
            self._attempts.append({"unit": 0, "tile": tile, **place, "free": free, "tried": UNLOAD_OTHERS})

    def _making_room(self, step: Callable[[], Made], memory: TileMemory) -> Made:
        """What a step before or after the tiles makes; where memory runs out in it, again without the other models.

        Raises:
            mm.OOM_EXCEPTION: no other model is left to unload, and the message says so; or on_oom is error.
        """
        while True:
            try:
                return step()
            except memory_errors() as error:
                if self.options.on_oom != SHRINK or not is_out_of_memory(error):
                    raise
                words = str(error)
            # Outside the handler: the traceback holds the tensors of the step.
            gc.collect()
            empty_caches()
            place: dict[str, Any] = {"dtype": dtype_name(self.vae.vae_dtype), "device": str(self.vae.device)}
            place["free"], made_room = memory.read().free, self._unload_others()
            self._attempts.append({"unit": 0, "tile": "", **place, "tried": UNLOAD_OTHERS if made_room else ""})
            if not made_room:
                raise self._attempts.exhausted(words, "Choose a smaller image, or unload other models.")

    def _finished(self, job: TileJob) -> Tensor:
        return self.vae.process_output(job.result) if isinstance(job, BlendDecode) else job.result

    def _unload_others(self) -> bool:
        return residency.unload_others(self.vae.device, [self.vae.patcher])

    def _first_tile(self, memory: TileMemory) -> tuple[int, int]:
        """Side and overlap to start with."""
        tile = min(self.options.tile, MAX_TILE) or memory.largest_tile(SIDES)
        if tile < self.options.tile:
            self.notes.append(f"tile_size {self.options.tile} was lowered to {tile}, the largest.")
        smallest = 2 * self._compression
        if tile < smallest:
            self.notes.append(f"tile_size {tile} was raised to {smallest}: two latents of this VAE.")
            tile = smallest
        overlap = self.options.overlap
        if overlap > tile // 2:
            self.notes.append(f"overlap {overlap} was lowered to {tile // 2}, half of a tile.")
            overlap = tile // 2
        return tile, overlap

    def _predicted(self, source: Tensor, tile: int) -> int:
        """Bytes that a tile of that side needs beside the weights: counted by the exact path, or estimated by ComfyUI
        for the tile's shape."""
        if self._exact is not None:
            return self._exact.predicted(tile)
        cut = tile if self.encodes else -(-tile // self._compression)
        shape = (1, *source.shape[1:-2], *(min(cut, length) for length in source.shape[-2:]))
        estimate = self.vae.memory_used_encode if self.encodes else self.vae.memory_used_decode
        return int(estimate(shape, self.vae.vae_dtype))

    def _exact_path(self, source: Tensor) -> ExactPath | None:
        """The exact path, where it is wanted and possible.

        Raises:
            ValueError: mode exact, and it is not possible.
        """
        if self.options.mode == BLEND:
            self._report["mode_reason"] = "chosen"
            return None
        found, reason = self._tried_exact_path(source)
        if found is None and self.options.mode == EXACT:
            raise ValueError(
                f"{self.node}: expected a VAE with an exact path for mode exact; got one without: {reason}. "
                "Choose auto."
            )
        self._report["mode_reason"] = reason
        return found

    def _tried_exact_path(self, source: Tensor) -> tuple[ExactPath | None, str]:
        """As `exact_path`, tried again without the other models on the device if memory runs out in its trial."""
        frames = source.shape[2] if source.ndim == 5 else 1
        while True:
            try:
                return exact_path(self.vae, self.encodes, self._pixels(source), frames, self._compression)
            except memory_errors() as error:
                if self.options.on_oom != SHRINK or not is_out_of_memory(error):
                    raise
            # Outside the handler: the traceback holds the tensors of the trial.
            gc.collect()
            empty_caches()
            if not self._unload_others():
                return None, "its trial ran out of memory"

    def _job(self, source: Tensor, tile: int, overlap: int) -> TileJob:
        if self._exact is not None:
            return self._exact.job(source, tile)
        network, size = self.vae.first_stage_model, self._compression
        place: dict[str, Any] = {
            "device": self.vae.device,
            "dtype": self.vae.vae_dtype,
            "spot": self.options.verify == SPOT,
        }
        # A norm over groups of channels takes its statistics from everything it sees.
        if source.ndim == 4 and any(isinstance(layer, nn.GroupNorm) for layer in network.modules()):
            place["shapes"] = THREE_GRIDS
        if self.encodes:
            prepare = self.vae.process_input
            return BlendEncode(network.encode, source, tile, overlap, size, **place, prepare=prepare)
        return BlendDecode(network.decode, source, tile, overlap, size, **place)

    def _ladder(
        self, job: TileJob, weights: CastWeights, memory: TileMemory, source: Tensor, *, untried: bool
    ) -> TileLadder:
        """`untried`: the weights did not fit, so that there was no trial of the exact path."""
        # Blended tiles in half precision may be far off, and nobody has chosen them.
        untried = untried and self.options.mode != BLEND
        halves = [item for item in getattr(self.vae, "working_dtypes", ()) if item.itemsize < job.dtype.itemsize]
        return TileLadder(
            self.node,
            job,
            weights.run,
            self._smaller(job.tile, source),
            halves[0] if halves and not untried else None,
            self.options.allow_cpu and not (untried and self.options.mode == EXACT),
            self.options.on_oom == SHRINK,
            self._unload_others,
            lambda device, dtype: self._move(weights, device, dtype),
            lambda: memory.read().free,
            self._attempts,
        )

    def _carry_out(self, ladder: TileLadder, memory: TileMemory, source: Tensor) -> None:
        job = ladder.job
        bar = comfy.utils.ProgressBar(job.total, node_id=self.node_id)
        if self._exact is None:
            with memory.measuring_tile():
                self._advance(ladder)
            self._recalibrate(ladder, memory, source)
            bar.update_absolute(job.done, job.total)
        while job.done < job.total:
            self._advance(ladder)
            bar.update_absolute(job.done, job.total)

    def _advance(self, ladder: TileLadder) -> None:
        """Computes one tile, again in fp32 if it is not finite."""
        job, on_step = ladder.job, mm.throw_exception_if_processing_interrupted
        try:
            return ladder.advance(on_step)
        except NotFinite as error:
            if job.dtype == torch.float32:
                raise self._not_finite(error) from error
            self._again.append(str(error).partition("; ")[2])
        dtype, job.dtype, ladder.prepared = job.dtype, torch.float32, False
        try:
            ladder.advance(on_step)
        except NotFinite as error:
            raise self._not_finite(error) from error
        finally:
            job.dtype, ladder.prepared = dtype, False

    def _not_finite(self, error: NotFinite) -> ValueError:
        return ValueError(f"{self.node}: {error} Check the input, or load another VAE.")

    def _note_again(self) -> None:
        named, more = self._again[:NAMED_TILES], len(self._again) - NAMED_TILES
        self.notes += [f"Computed again in float32: {words}" for words in named]
        if more > 0:
            self.notes.append(f"Computed again in float32: {more} more tiles.")

    def _recalibrate(self, ladder: TileLadder, memory: TileMemory, source: Tensor) -> None:
        """Changes to the side that fits by what the first tile was measured to take."""
        job = ladder.job
        if ladder.attempts or self.options.on_oom != SHRINK:
            return
        sides = SIDES if not self.options.tile else [job.tile, *(side for side in SIDES if side < job.tile)]
        side = memory.fitting_tile(job.tile, [side for side in sides if side >= 2 * self._compression])
        if side is None or side == job.tile or (job.total == 1 and side > job.tile):
            return
        self.notes.append(f"After the first tile, tiles of {job.tile} px were changed to {side} px by measurement.")
        job.cut(side)
        ladder.tiles[:] = self._smaller(side, source)

    def _smaller(self, tile: int, source: Tensor) -> list[int]:
        return smaller_tiles(tile, max(self._pixels(source)), max(MIN_TILE, 2 * self._compression))

    def _move(self, weights: CastWeights, device: torch.device, dtype: torch.dtype) -> None:
        """Swaps in copies of the weights; ComfyUI's own leave the device first."""
        residency.offload_model(self.vae)
        weights.own = None
        weights.prepare(device, dtype)

    def _explain_channels(self, source: Tensor, error: RuntimeError) -> None:
        wanted, got = getattr(self.vae, "latent_channels", None), source.shape[1]
        if not self.encodes and wanted is not None and wanted != got and not isinstance(error, mm.OOM_EXCEPTION):
            raise ValueError(
                f"{self.node}: expected latents of {wanted} channels for this VAE; got {got}. Decode them with the "
                "VAE that belongs to their model."
            ) from error

    def _describe(self, source: Tensor, job: TileJob, result: Tensor, ladder: TileLadder) -> None:
        height, width = self._pixels(source)
        spot = job.spot_db if isinstance(job, BlendEncode | BlendDecode) else None
        self._report |= {
            "mode": BLEND if self._exact is None else EXACT,
            "device": str(job.device),
            "dtype": dtype_name(job.dtype),
            "size": [width, height],
            "samples": source.shape[0],
            "frames": (source if self.encodes else result).shape[2] if source.ndim == 5 else 1,
            "result_shape": list(result.shape),
            "tile_size": job.tile,
            "overlap": job.overlap if isinstance(job, BlendEncode | BlendDecode) else None,
            "grid": list(job.grid) if isinstance(job, BlendEncode | BlendDecode) else None,
            "units": job.total,
            "spot_db": None if spot is None else round(spot, 2),
            "output_dtype": dtype_name(versions.vae_output_dtype(self.vae)),
            "output_bytes": result.nbytes,
            "attempts": ladder.attempts,
        }
