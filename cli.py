"""The command line: upscale, inspect, demo, doctor. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done · 1 the machine could not (out of memory, no download) · 2 bad input, said in one line · 130 Ctrl-C.
doctor: 0 nothing is held · 1 something is held or grows · 2 that could not be measured, or bad input.
"""

# ruff: noqa: E402  the environment is set before torch is imported
from __future__ import annotations

import os

# OpenMP's threads spin while they wait. Where other programs use the cores too, that made the demo 5 to 25 times slower
# (2 threads on 2 busy cores: 12 to 57 s; passive waiting: 2.6 s). Read once, when torch loads the library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from .app.clip import (
    OutputOptions,
    RunReport,
    choose_device,
    choose_dtype,
    open_writer,
    peak_rss_bytes,
    upscale_clip,
)
from .app.demo import run_demo
from .app.doctor import examine
from .app.folder import Manifest, Night, WorkerSettings, find_jobs, folder_settings, holds_videos, run_night
from .memory.host import fix_heap_growth
from .models.flashvsr import FlashVSR, StreamOptions
from .models.flashvsr.attention import backend_choices
from .models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from .models.flashvsr.checkpoint.download import DownloadError, download_flashvsr
from .models.flashvsr.checkpoint.inspect import CheckpointReport, inspect_checkpoint
from .models.flashvsr.config import COLOURS, LQ_CACHE_ORDERS, PRECISIONS
from .models.video import open_clip
from .models.wan_vae import StreamingDecoder, load_wan_vae

EXIT_MACHINE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
DOWNLOAD_VERSION = "v1.1"
LISTED_KEYS = 8
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; argparse itself exits with 2 for arguments that do not parse."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = _parser().parse_args(arguments)
    fix_heap_growth()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        _say("Stopped. Nothing was left behind.")
        return EXIT_INTERRUPTED
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        _say(f"Error: out of memory: {reason} Try a smaller --scale, or --tile 512 (costs quality).")
        return EXIT_MACHINE
    except DownloadError as error:
        _say(f"Error: {error}")
        return EXIT_MACHINE
    except (ValueError, OSError) as error:
        _say(f"Error: {_message(error)}")
        return EXIT_BAD_INPUT


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _message(error: ValueError | OSError) -> str:
    """Without the error number that OSError puts in front where its text is one of ours."""
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steadyvsr", description="FlashVSR video super-resolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_upscale(commands.add_parser("upscale", help="upscale a video, an image sequence or an image"))
    inspect = commands.add_parser("inspect", help="what a checkpoint is: family, version, fingerprint, keys, bytes")
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a file or a folder of weights")
    inspect.add_argument("--json", action="store_true", help="print a machine-readable report")
    inspect.set_defaults(run=_run_inspect)
    demo = commands.add_parser("demo", help="upscale a short made-up clip four times with the embedded network")
    demo.add_argument("--out", default="demo_output", metavar="DIR", help="where to write (default: %(default)s)")
    demo.add_argument("--seconds", type=_positive, default=1.25, help="length of the clip (default: %(default)s)")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print a machine-readable report")
    demo.set_defaults(run=_run_demo)
    doctor = commands.add_parser("doctor", help="what can be measured here, and whether memory comes back (≤ 60 s)")
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    doctor.add_argument("--json", action="store_true", help="print a machine-readable report")
    doctor.set_defaults(run=_run_doctor)
    return parser


def _add_upscale(parser: argparse.ArgumentParser) -> None:
    defaults = StreamOptions()
    parser.add_argument(
        "input", metavar="IN", help="a video, an image, a folder of videos or of images, shot_%%04d.png or '*.png'"
    )
    parser.add_argument(
        "output", metavar="OUT", help=".mp4, .mkv, .mov or .webm; a folder for --image-sequence or a folder of videos"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="PATH", help="a folder or file of weights (default: the embedded one)")
    model.add_argument("--version", choices=("auto", "v1", "v1.1"), default="auto", help="of the weights")
    model.add_argument(
        "--lq-cache-order", choices=LQ_CACHE_ORDERS, default="fixed",
        help="v1 weights only. fixed: each clip sees the frames before it. as_trained: it sees its own last frames"
        " instead, as in the released code that the v1 weights were trained with",
    )  # fmt: skip
    model.add_argument(
        "--download", action="store_true",
        help=f"fetch the official weights (6.4 GB) into the folder --model first (--version auto: {DOWNLOAD_VERSION})",
    )  # fmt: skip
    model.add_argument("--decoder", choices=("tc", "vae"), default="tc", help="tc: fast; vae: the full Wan 2.1 decoder")
    model.add_argument("--vae", metavar="FILE", help="weights of the Wan 2.1 VAE, for --decoder vae")
    run = parser.add_argument_group("run")
    run.add_argument("--scale", type=float, default=defaults.scale, help="1.0 to 8.0 (default: %(default)s)")
    run.add_argument("--seed", type=int, default=defaults.seed, help="of the noise (default: %(default)s)")
    run.add_argument("--sparse-ratio", type=float, default=defaults.sparse_ratio, help="(default: %(default)s)")
    run.add_argument("--kv-ratio", type=float, default=defaults.kv_ratio, help="(default: %(default)s)")
    run.add_argument("--local-range", type=int, default=defaults.local_range, help="in blocks (default: %(default)s)")
    run.add_argument("--colour", choices=COLOURS, default=defaults.colour, help="colour transfer from the input")
    run.add_argument("--attention", choices=backend_choices(), default=defaults.attention)
    run.add_argument(
        "--tile", type=int, metavar="PIXELS", help="output pixels per tile; the last resort: costs quality"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    run.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: fp32 on the CPU")
    run.add_argument(
        "--workers", type=_workers, metavar="N", default=None,
        help="for a folder of videos: auto (as many as the first clip's measured memory allows) or a number",
    )  # fmt: skip
    files = parser.add_argument_group("files")
    files.add_argument(
        "--force", action="store_true",
        help="overwrite OUT; for a folder of videos: take --workers N although they do not fit",
    )  # fmt: skip
    files.add_argument("--codec", help="FFmpeg encoder: libx264, libx265, libsvtav1, libvpx-vp9, prores_ks, ffv1, …")
    files.add_argument("--crf", type=int, help="quality of the encoder; lower is better")
    files.add_argument("--ten-bit", action="store_true", help="ten bits per colour (16 with --image-sequence)")
    files.add_argument("--image-sequence", action="store_true", help="write PNG files into the folder OUT")
    files.add_argument("--frame-rate", type=_rate, help="of an image sequence as IN (default: 24)")
    files.add_argument("--keep-damaged", action="store_true", help="upscale what can be read of a damaged IN")
    files.add_argument("--json", action="store_true", help="print a machine-readable report")
    parser.set_defaults(run=_run_upscale)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text}")
    return value


def _workers(text: str) -> int:
    """0 stands for auto."""
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 1; got {text}")
    return int(text)


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"expected frames per second such as 24 or 30000/1001; got {text}") from error
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"expected more than 0 frames per second; got {text}")
    return rate


def _run_upscale(args: argparse.Namespace) -> int:
    options = StreamOptions(
        scale=args.scale, seed=args.seed, sparse_ratio=args.sparse_ratio, kv_ratio=args.kv_ratio,
        local_range=args.local_range, colour=args.colour, attention=args.attention, tile=args.tile,
    )  # fmt: skip
    if (args.decoder == "vae") != (args.vae is not None):
        raise ValueError("--vae: expected together with --decoder vae, and only there.")
    if args.download and args.model is None:
        raise ValueError("--download: expected --model FOLDER, where the weights shall lie; got none.")
    source = Path(args.input)
    if source.is_dir() and (args.workers is not None or holds_videos(source)):
        return _run_folder(args, options)
    if args.workers is not None:
        what = "a single clip" if source.exists() else "nothing of that name"
        raise ValueError(f"--workers: expected a folder of videos as IN; got {what}.")
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    damaged = "keep" if args.keep_damaged else "raise"
    clip = open_clip(args.input, frame_rate=args.frame_rate, damaged=damaged)
    if damaged == "raise":
        clip.verify()
    output = OutputOptions(args.codec, args.crf, args.ten_bit, args.image_sequence, args.force)
    writer = open_writer(clip, args.output, options.scale, output)
    try:
        if args.download:
            _download(args)
        model = _load_model(args, dtype, device)
        vae = StreamingDecoder(load_wan_vae(args.vae, dtype, device)) if args.vae else None
        with tqdm(total=clip.frame_count, unit="frame", file=sys.stderr, disable=None, desc=clip.name) as bar:

            def show(phase: str, done: int, total: int | None) -> None:
                bar.set_postfix_str(f"{phase}, peak RAM {peak_rss_bytes() / MIB:,.0f} MiB{_cuda_text(device)}")

            report = upscale_clip(
                model, clip, writer, options, vae=vae, device=device, dtype=dtype,
                on_frame=lambda frame: bar.update(), on_step=show,
            )  # fmt: skip
    except BaseException:
        writer.abort()
        raise
    _print_run(report, args.json, {"input": str(args.input), "family": model.family, "version": model.version})
    if not report.complete:
        _say(f"Error: {report.notes[-1]} The frames read before that are in {report.output}.")
        return EXIT_BAD_INPUT
    return 0


def _run_folder(args: argparse.Namespace, options: StreamOptions) -> int:
    """0: every clip is done. 1: some are not, and the table says why."""
    if args.vae is not None or args.image_sequence or args.keep_damaged:
        raise ValueError("a folder of videos: expected neither --vae nor --image-sequence nor --keep-damaged.")
    if args.download:
        _download(args)
    jobs = find_jobs(Path(args.input), Path(args.output))
    output = OutputOptions(args.codec, args.crf, args.ten_bit, False, False)
    settings = [
        WorkerSettings(
            str(device), str(args.model or NANO_FILE), options, output, args.version, args.lq_cache_order,
            args.precision,
            threads=max(1, (os.cpu_count() or 1) // max(1, args.workers or os.cpu_count() or 1)),
        )
        for device in _all_devices(args.device)
    ]  # fmt: skip
    manifest = Manifest(Path(args.output), folder_settings(settings[0]))
    bars: dict[int, tqdm] = {}
    with tqdm(total=len(jobs), unit="clip", file=sys.stderr, disable=None, desc="all", position=0) as total:

        def say(line: str) -> None:
            tqdm.write(line, file=sys.stderr)

        def show(worker: int, name: str, done: int, frames: int | None) -> None:
            if worker not in bars:
                bars[worker] = tqdm(unit="frame", file=sys.stderr, disable=None, leave=False, position=worker + 1)
            bar = bars[worker]
            bar.total = frames
            bar.set_description(f"worker {worker}: {name}", refresh=False)
            bar.n = done
            bar.refresh()

        def finished(line: str) -> None:
            total.n = sum(manifest.finished(job) for job in jobs)
            total.refresh()
            say(line)

        night = Night(tuple(jobs), tuple(settings), args.workers or None, args.force)
        report = run_night(night, manifest, finished, show)
        for bar in bars.values():
            bar.close()
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print(report.table())
    return EXIT_MACHINE if report.failed or report.stopped else 0


def _all_devices(name: str) -> list[torch.device]:
    """auto: every CUDA device, else the CPU."""
    if name == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [choose_device(name)]


def _cuda_text(device: torch.device) -> str:
    return f", CUDA {torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB" if device.type == "cuda" else ""


def _load_model(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> FlashVSR:
    path = args.model
    if path is None:
        if not NANO_FILE.exists():
            raise ValueError(f"--model: expected weights; got none, and the embedded {NANO_FILE.name} is absent.")
        _say("No --model: using the embedded nano network, a small one made to show that everything works.")
        path = NANO_FILE
    return load_flashvsr(path, args.version, args.lq_cache_order, dtype=dtype, device=device)


def _download(args: argparse.Namespace) -> None:
    version = DOWNLOAD_VERSION if args.version == "auto" else args.version
    with tqdm(unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        download_flashvsr(version, args.model, progress=show)


def _print_run(report: RunReport, as_json: bool, extra: dict[str, object]) -> None:
    if as_json:
        print(json.dumps({**extra, **dataclasses.asdict(report)}, indent=2))
        return
    for note in report.notes:
        _say(f"Note: {note}")
    print(f"{report.output}: {report.frames} frames of {report.width}x{report.height}")
    print(f"{report.seconds:.1f} s, {report.frames_per_second:.2f} frames per second, peak {_peak_text(report)}")


def _peak_text(report: RunReport) -> str:
    text = f"process RAM {report.peak_rss_bytes / MIB:,.0f} MiB"
    return text if report.peak_cuda_bytes is None else f"{text}, CUDA tensors {report.peak_cuda_bytes / MIB:,.0f} MiB"


def _run_inspect(args: argparse.Namespace) -> int:
    reports, code = [], 0
    for file in args.files:
        try:
            reports.append(inspect_checkpoint(file))
        except (ValueError, OSError) as error:
            _say(f"Error: {_message(error)}")
            code = EXIT_BAD_INPUT
    if args.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
        return code
    for report in reports:
        _print_checkpoint(report)
    return code


def _print_checkpoint(report: CheckpointReport) -> None:
    print(f"{report.path}: family {report.family or 'unknown'}, version {report.version or 'unknown'}")
    for file in report.files:
        known = f", the published {file.known_as}" if file.known_as else ""
        print(f"  file {Path(file.path).name}: {file.format}, {file.bytes:,} bytes{known}")
        print(f"    sha256 {file.sha256}")
    for part in report.parts:
        shape = f", shape {list(part.shape)}" if part.shape else ""
        print(
            f"  {part.part} in {part.file}: {part.tensors} tensors, {part.parameters:,} parameters,"
            f" {part.bytes:,} bytes as {', '.join(part.dtypes)}{shape}"
        )
        print(f"    version {part.version or 'unknown'}{f' ({part.how_known})' if part.how_known else ''}")
        if part.fingerprint:
            print(f"    fingerprint {part.fingerprint}")
        for label, keys in (("missing", part.missing), ("extra", part.extra), ("ignored", part.ignored)):
            if keys:
                more = " …" if len(keys) > LISTED_KEYS else ""
                print(f"    {len(keys)} {label} keys: {', '.join(keys[:LISTED_KEYS])}{more}")
    if report.absent:
        print(f"  absent: {', '.join(report.absent)}")
    for problem in report.unreadable:
        print(f"  unreadable: {problem}")


def _run_demo(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    model = load_flashvsr(NANO_FILE, dtype=dtype, device=device)
    with tqdm(unit="frame", file=sys.stderr, disable=None, desc="demo") as bar:
        report = run_demo(
            Path(args.out), args.seconds, model, device=device, dtype=dtype, on_frame=lambda frame: bar.update()
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return 0
    print(f"video:      {report.run.output}")
    print(f"comparison: {report.comparison} (input | bicubic | output | ground truth)")
    print(
        f"{report.run.frames} frames of {report.run.width}x{report.run.height} in {report.run.seconds:.1f} s,"
        f" {report.run.frames_per_second:.2f} frames per second, peak {_peak_text(report.run)}"
    )
    print(f"bicubic: PSNR {report.bicubic_psnr:.2f} dB, SSIM {report.bicubic_ssim:.4f}")
    print(f"output:  PSNR {report.output_psnr:.2f} dB, SSIM {report.output_ssim:.4f}")
    return 0


def _run_doctor(args: argparse.Namespace) -> int:
    """0: nothing is held and nothing grows. 1: something is, and the report says what. 2: that cannot be measured."""
    device = choose_device(args.device)
    findings = examine(lambda: load_flashvsr(NANO_FILE, dtype=choose_dtype("auto", device), device="cpu"), device)
    if args.json:
        print(json.dumps(findings.to_json(), indent=2))
    else:
        print("\n".join(findings.lines()))
    return findings.exit_code
