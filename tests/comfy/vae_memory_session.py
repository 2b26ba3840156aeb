"""Run by a real ComfyUI's Python, in its folder: the tiled VAE nodes where memory runs out, is measured, or a run ends
in the middle.

    python vae_memory_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line; the assertions are in test_vae.py.
"""

from __future__ import annotations

import contextlib

import vae_host as host  # starts ComfyUI; what follows needs that

# isort: split
import small_vaes
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from vae_host import KINDS, apart, decode, error_of, latents_of, live_bytes, mm, pack, vae_of


class Card(TorchDispatchMode):
    """Fails the third new storage of a tile that does not fit."""

    def __init__(self, fits) -> None:
        super().__init__()
        self.fits, self.made = fits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage()._cdata not in given for x in made):
            self.made += 1
            if self.made > 2 and not self.fits():
                self.made = 0
                raise mm.OOM_EXCEPTION("scripted")
        return result


@contextlib.contextmanager
def card(fits):
    """Both nodes under a card on which a tile fits only where `fits(job)`."""
    run = pack("nodes.vae.run")
    make, jobs = run.TiledRun._ladder, []

    def ladder(self, job, *arguments, **keywords):
        made = make(self, job, *arguments, **keywords)
        around = made.around

        def tried(compute):
            jobs.append((job.done, job.tile, str(job.dtype)))

            def checked():
                with Card(lambda: fits(job)):
                    compute()

            around(checked)

        made.around = tried
        return made

    run.TiledRun._ladder = ladder
    try:
        yield jobs
    finally:
        run.TiledRun._ladder = make


def scripted_oom(kind: str) -> dict:
    """One failure at each of several tiles; then cards on which only small tiles, small numbers, or nothing fits."""
    vae, found = vae_of(kind), {"at": []}
    latents = latents_of(kind, 2, 12, 14)
    for mode in ("auto", "blend"):
        wanted, calm = decode(vae, latents, mode=mode)
        units = calm["units"]
        for at in sorted({0, 1, units // 2, units - 1} if kind != "flux" else {2}):
            failed = []

            def fits(job, at=at, failed=failed):
                if job.done == at and not failed:
                    failed.append(at)
                    return False
                return True

            mm.load_models_gpu([vae_of("taesd").patcher])
            with card(fits) as jobs:
                result, report = decode(vae, latents, mode=mode)
            found["at"].append(
                {"mode": mode, "at": at, "failed": len(failed), "tries": len(jobs), "units": units,
                 "error": apart(result, wanted), "attempts": report["attempts"]}
            )  # fmt: skip
        before = live_bytes()
        for name, rule in {
            "tile": lambda job: job.tile <= 64,
            "dtype": lambda job: job.dtype == torch.bfloat16,
            "nothing": lambda job: False,
        }.items():
            mm.load_models_gpu([vae_of("taesd").patcher])
            with card(rule):
                if name == "nothing":
                    found[f"{mode} {name}"] = {"error": error_of(decode, vae, latents, tile_size=128, mode=mode)}
                    continue
                result, report = decode(vae, latents, tile_size=128, overlap=32, mode=mode)
            calm, _ = decode(vae, latents, tile_size=64, overlap=32, mode=mode)
            found[f"{mode} {name}"] = {
                "rungs": [item["tried"] for item in report["attempts"]], "error": apart(result, calm),
                "tile": report["tile_size"], "dtype": report["dtype"], "attempts": report["attempts"],
            }  # fmt: skip
        del result
        found[f"{mode} held"] = live_bytes() - before
    return found


def ladder_alone() -> dict:
    """Every rung in order, on a job of which nothing fits, and what is said of a device that is no CPU."""
    ladders = pack("nodes.vae.ladder")

    class Job:
        device, dtype, tile, done, total = torch.device("meta"), torch.float32, 256, 0, 1

        def advance(self, on_step):
            raise mm.OOM_EXCEPTION("scripted")

        def cut(self, tile):
            self.tile = tile

    def ladder(shrink=True, allow_cpu=True, raises=None):
        others, prepared = [True], []
        job = Job()
        if raises is not None:
            job.advance = lambda on_step: (_ for _ in ()).throw(raises)
        made = ladders.TileLadder(
            "Node", job, lambda compute: compute(), ladders.smaller_tiles(256, 480, 64), torch.bfloat16, allow_cpu,
            shrink, lambda: bool(others) and others.pop(), lambda *place: prepared.append([str(p) for p in place]),
            lambda: 1 << 20, pack("nodes.attempts").Attempts("Node", ladders.ATTEMPT_COLUMNS),
        )  # fmt: skip
        return made, prepared

    made, prepared = ladder()
    words = error_of(made.advance, lambda: None)
    no_cpu, _ = ladder(allow_cpu=False)
    stopped, _ = ladder(shrink=False)
    other, _ = ladder(raises=RuntimeError("shape"))
    return {
        "rungs": [item["tried"] for item in made.attempts], "prepared": prepared, "words": words,
        "no_cpu": [item["tried"] for item in no_cpu.attempts] if error_of(no_cpu.advance, lambda: None) else [],
        "no_cpu_words": error_of(ladder(allow_cpu=False)[0].advance, lambda: None),
        "stopped": error_of(stopped.advance, lambda: None), "stopped_rungs": [i["tried"] for i in stopped.attempts],
        "other": error_of(other.advance, lambda: None), "other_rungs": [i["tried"] for i in other.attempts],
        "sides": {str(t): ladders.smaller_tiles(t, 2000, 64) for t in (64, 96, 256, 512)},
        "small_image": ladders.smaller_tiles(512, 100, 64),
    }  # fmt: skip


def not_a_number(kind: str) -> dict:
    """A VAE in bf16 whose network gives NaN in bf16 at one call; then in every number format."""
    vae, latents = small_vaes.SMALL_VAES[kind](), latents_of(kind, 1, 12, 14)
    vae.first_stage_model.to(torch.bfloat16)
    vae.vae_dtype = torch.bfloat16
    calm, _ = decode(vae, latents, mode="blend")
    calls, state = [], {"always": False}

    def spoil(module, args, output):
        calls.append(args[0].dtype)
        bad = (len(calls) == 2 and args[0].dtype == torch.bfloat16) or state["always"]
        return output * float("nan") if bad else output

    handle = vae.first_stage_model.decoder.register_forward_hook(spoil)
    if kind == "wan":
        handle.remove()
        whole = vae.first_stage_model.decode

        def decode_all(z):
            return spoil(None, (z,), whole(z))

        vae.first_stage_model.decode = decode_all
    result, report = decode(vae, latents, mode="blend")
    weights = {str(parameter.dtype) for parameter in vae.first_stage_model.parameters()}
    state["always"] = True
    words = error_of(decode, vae, latents, mode="blend")
    return {
        "dtypes": [str(dtype) for dtype in calls[:4]], "notes": report["notes"],
        "finite": bool(result.isfinite().all()),
        "error": apart(result, calm), "weights_after": sorted(weights), "words": words,
    }  # fmt: skip


def memory() -> dict:
    """The books and the report: what is asked of ComfyUI, what is measured, and when it counts as verified."""
    probe, tracker = pack("memory.probe"), pack("memory.tracker").StorageTracker
    vae, latents, found, asked = vae_of("sd"), latents_of("sd", height=24, width=32), {}, []
    load = mm.load_models_gpu

    def loads(models, memory_required=0, **more):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    mm.load_models_gpu = loads
    try:
        for mode in ("auto", "blend"):
            asked.clear()
            with probe.tracking(tracker()) as counted:
                result, report = decode(vae, latents, mode=mode)
                found[mode] = {"report": report, "own_peak": counted.peak, "asked": list(asked)}
            found[mode]["whole"] = vae.memory_used_decode(latents.shape, vae.vae_dtype)
            found[mode]["tile"] = vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype)
        with probe.tracking(tracker()):
            _, found["tight"] = decode(vae, latents, memory_budget_gb=0.017)
        _, found["unmeasured"] = decode(vae, latents)
        with probe.tracking(tracker()):
            _, found["auto tile"] = decode(vae, latents, tile_size=0, memory_budget_gb=0.06, mode="blend")
            _, found["shrunk"] = decode(vae, latents, tile_size=192, memory_budget_gb=0.025, mode="blend")
            _, found["roomy"] = decode(vae, latents, tile_size=0, mode="blend")
        kept, original = [], vae.process_output

        def leaks(image):
            kept.append(torch.ones(8 << 20))
            return original(image)

        vae.process_output = leaks
        with probe.tracking(tracker()):
            _, found["leak"] = decode(vae, latents, mode="blend")
        vae.process_output = original
    finally:
        mm.load_models_gpu = load
    del result
    return found


def interrupts() -> dict:
    """An interrupt in the middle, and an error that has nothing to do with memory: both pass, and nothing stays."""
    found = {}
    for kind in KINDS:
        vae, latents = vae_of(kind), latents_of(kind, 2)
        for mode in ("auto", "blend"):
            decode(vae, latents, mode=mode)
            before, count = live_bytes(), [0]
            ask = mm.throw_exception_if_processing_interrupted

            def stop(count=count):
                count[0] += 1
                if count[0] == 3:
                    raise mm.InterruptProcessingException()

            mm.throw_exception_if_processing_interrupted = stop
            name = "none"
            try:
                decode(vae, latents, mode=mode)
            except BaseException as error:  # noqa: BLE001  in 0.33 an interrupt is a BaseException
                name = type(error).__name__
            finally:
                mm.throw_exception_if_processing_interrupted = ask
            hooks = [m for m in vae.first_stage_model.modules() if m._forward_hooks or m._forward_pre_hooks]
            found[f"{kind} {mode}"] = {"error": name, "held": live_bytes() - before, "hooks": len(hooks)}
    return found


host.tell(
    {
        **{f"oom {kind}": (lambda kind=kind: scripted_oom(kind)) for kind in KINDS},
        "ladder": ladder_alone,
        **{f"nan {kind}": (lambda kind=kind: not_a_number(kind)) for kind in ("wan", "sd")},
        "memory": memory, "interrupts": interrupts,
    }
)  # fmt: skip
