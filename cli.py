"""The command line: upscale, inspect, demo, doctor. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done · 1 the machine failed (out of memory, no download) · 2 bad input, explained in a line · 130 Ctrl-C,
or SIGTERM, which is heard as Ctrl-C.
A folder of videos: 1 if a clip failed. doctor: 1 memory is held or grows · 2 that could not be measured, or bad input.
"""

# ruff: noqa: E402  the environment is set before torch is imported
from __future__ import annotations

import os

# OpenMP threads spin while they wait. With other programs on the same cores that made the demo 5 to 25 times slower
# (2 threads on 2 busy cores: 12 to 57 s; passive waiting: 2.6 s). OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .app import card
from .app.clip import (
    OutputOptions,
    RunReport,
    choose_device,
    choose_dtype,
    footage_of,
    is_memory_error,
    open_writer,
    peak_cuda_bytes,
    peak_rss_bytes,
    upscale_clip,
)
from .app.demo import run_demo
from .app.doctor import examine
from .app.folder import (
    FolderRun,
    Manifest,
    WorkerSettings,
    find_jobs,
    folder_settings,
    holds_videos,
    run_folder,
)
from .memory.host import fix_heap_growth
from .models.flashvsr import StreamOptions
from .models.flashvsr.attention import backend_choices
from .models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from .models.flashvsr.checkpoint.download import DownloadError, download_flashvsr
from .models.flashvsr.checkpoint.inspect import CheckpointReport, inspect_checkpoint
from .models.flashvsr.config import COLOURS, LQ_CACHE_ORDERS, PRECISIONS
from .models.printable import printable
from .models.video import open_clip
from .models.wan_vae import StreamingDecoder, load_wan_vae

EXIT_MACHINE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
DOWNLOAD_VERSION = "v1.1"
LISTED_KEYS, LINE_CHARACTERS = 8, 2000
MIB = 1 << 20

_log = logging.getLogger("steadyvsr.told")
"""What was said to the user; only a journal listens."""
_log.setLevel(logging.INFO)
_log.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; argparse itself exits with 2 for arguments that do not parse."""
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    options = _parser().parse_args(arguments)
    fix_heap_growth()
    with _stop_signals(), ExitStack() as stack:
        try:
            if getattr(options, "log", None):
                stack.enter_context(_journal(Path(options.log)))
            return options.run(options)
        except KeyboardInterrupt as stop:
            _say(str(stop) or "Stopped.")
            return EXIT_INTERRUPTED
        except DownloadError as error:
            _say(f"Error: {error}")
            return EXIT_MACHINE
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if is_memory_error(error):
                reason = (str(error).splitlines() or ["the machine has no more"])[0]
                _say(f"Error: out of memory: {reason} Try a smaller --scale, or --tile 512 (costs quality).")
                return EXIT_MACHINE
            if not isinstance(error, (ValueError, OSError)):
                raise
            _say(f"Error: {_message(error)}")
            return EXIT_BAD_INPUT


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM (a service manager, `timeout`) and a closed terminal are heard as Ctrl-C: nothing is left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup has a run outlive its terminal by ignoring the signal: that stays.
    earlier = {number: signal.getsignal(number) for number in numbers}
    for number, handler in earlier.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def _journal(path: Path) -> Iterator[None]:
    """Writes all that a user is told to the end of a file as well, with the time."""
    if path.exists() and b"\0" in path.open("rb").read(4096):
        raise ValueError(f"--log: expected a text file, or a new name; got {path}, which holds something else.")
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_EscapingFormatter("%(asctime)s %(message)s"))
    loggers = (_log, logging.getLogger("steadyvsr"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _say(text: str) -> None:
    text = _escaped(text)
    print(text, file=sys.stderr)
    _log.info(text)


def _escaped(text: str) -> str:
    """The text with control characters as escapes: names, keys and metadata come from files of strangers."""
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))


class _EscapingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _escaped(super().format(record))


def _message(error: ValueError | OSError) -> str:
    """The error's text; of an OSError with a text of ours, without the error number in front."""
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steadyvsr", description="FlashVSR video super-resolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report, device = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    report.add_argument("--json", action="store_true", help="print a machine-readable report")
    device.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    add, both = commands.add_parser, [device, report]
    upscale = add("upscale", parents=both, help="upscale a video, an image sequence, an image or a folder of videos")
    _add_upscale_options(upscale)
    upscale.set_defaults(run=_run_upscale)
    inspect = add("inspect", parents=[report], help="show what weights are: family, version, fingerprint, keys, bytes")
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a file or a folder of weights")
    inspect.set_defaults(run=_run_inspect)
    demo = add("demo", parents=both, help="upscale a short generated clip four times with the embedded network")
    demo.add_argument("--out", default="demo_output", metavar="DIR", help="output folder (default: %(default)s)")
    demo.add_argument("--seconds", type=_positive, default=1.25, help="length of the clip (default: %(default)s)")
    demo.set_defaults(run=_run_demo)
    doctor = add("doctor", parents=[device], help="check what can be measured here and whether memory comes back")
    doctor.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="print a machine-readable report, or write it to FILE"
    )
    doctor.add_argument(
        "--full", action="store_true",
        help="every promise on this card, in at most 15 minutes: attention, golden vectors, speed, 200 frames three"
        " times, peaks against predictions, Wan VAE, offloads, workers. Random weights; nothing is downloaded",
    )  # fmt: skip
    doctor.add_argument("--reduced", action="store_true", help="with --full: a rehearsal with tiny weights, anywhere")
    doctor.set_defaults(run=_run_doctor)
    return parser


def _add_upscale_options(parser: argparse.ArgumentParser) -> None:
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
    text = f"fetch the official weights (6.4 GB) into the folder --model first (--version auto: {DOWNLOAD_VERSION})"
    model.add_argument("--download", action="store_true", help=text)
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
    run.add_argument("--tile", type=int, metavar="PIXELS", help="output pixels per tile: a last resort, costs quality")
    run.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: fp32 on the CPU")
    text = "for a folder of videos: auto (as many as the measured memory of its first clip allows) or a number"
    run.add_argument("--workers", type=_workers, metavar="N", help=text)
    files = parser.add_argument_group("files")
    text = (
        "overwrite OUT; for a folder of videos: overwrite files that no earlier run made, and start --workers N even if"
        " they do not fit"
    )
    files.add_argument("--force", action="store_true", help=text)
    files.add_argument("--log", metavar="FILE", help="write all that is said to the end of FILE as well, with the time")
    text = (
        "FFmpeg encoder: libx264, libx265, libsvtav1, libvpx-vp9, prores_ks, ffv1, h264_nvenc, hevc_nvenc, …; auto: the"
        " card's (NVENC) where it passes a check, else the CPU's"
    )
    files.add_argument("--codec", help=text)
    files.add_argument("--crf", type=int, help="quality of the encoder; lower is better")
    files.add_argument("--preset", help="speed of the encoder against size of OUT, in its own words: slow, p6, 8, …")
    files.add_argument("--encoder-threads", type=_workers, metavar="N", help="of the encoder: auto or a number")
    files.add_argument("--ten-bit", action="store_true", help="ten bits per colour (16 with --image-sequence)")
    files.add_argument("--image-sequence", action="store_true", help="write PNG files into the folder OUT")
    files.add_argument("--start", type=_positive, metavar="SECONDS", help="of IN: leave out what comes before")
    files.add_argument("--duration", type=_positive, metavar="SECONDS", help="of IN, from --start on")
    files.add_argument("--frame-rate", type=_positive, help="of IN if it is an image sequence (default: 24)")
    files.add_argument("--keep-damaged", action="store_true", help="upscale the readable part of a damaged IN")


def _positive(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0 such as 24, 1.25 or 30000/1001; got {text}")
    return value


def _workers(text: str) -> int:
    """0 stands for auto."""
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 1; got {text}")
    return int(text)


def _run_upscale(args: argparse.Namespace) -> int:
    given = (field.name for field in dataclasses.fields(StreamOptions) if field.name in args)
    options = StreamOptions(**{name: getattr(args, name) for name in given})
    if (args.decoder == "vae") != (args.vae is not None):
        raise ValueError("--vae: expected together with --decoder vae, and only there.")
    if args.download and args.model is None:
        raise ValueError("--download: expected --model FOLDER to put the weights into; got none.")
    for name, path in (("IN", args.input), ("OUT", args.output), ("--model", args.model), ("--vae", args.vae)):
        if path == "":  # Path("") would be the current folder
            raise ValueError(f"{name}: expected a path; got an empty one.")
    source = Path(args.input)
    if source.is_dir() and (args.workers is not None or holds_videos(source)):
        return _run_folder(args, options)
    if args.workers is not None:
        what = "a single clip" if source.exists() else "no such file"
        raise ValueError(f"--workers: expected a folder of videos as IN; got {what}.")
    if source.exists() and os.path.exists(args.output) and os.path.samefile(source, args.output):
        raise ValueError(
            f"OUT: expected another file than IN; got the same, {args.output}. It would replace the source."
        )
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    clip = open_clip(
        args.input, frame_rate=args.frame_rate, start=args.start or 0, duration=args.duration,
        damaged="keep" if args.keep_damaged else "raise",
    )  # fmt: skip
    footage = footage_of(clip)
    output = OutputOptions(
        args.codec, args.crf, args.ten_bit, args.image_sequence, args.force, args.preset, args.encoder_threads
    )
    writer = open_writer(footage, args.output, options.scale, output)
    try:
        if args.download:
            _download(args)
        if args.model is None:
            _say("No --model: using the embedded nano network, a tiny one that shows that everything works.")
        model = load_flashvsr(args.model or NANO_FILE, args.version, args.lq_cache_order, dtype=dtype, device=device)
        vae = StreamingDecoder(load_wan_vae(args.vae, dtype, device)) if args.vae else None
        with tqdm(total=clip.frame_count, unit="frame", disable=None, desc=clip.name) as bar:

            def show(phase: str, done: int, total: int | None) -> None:
                bar.set_postfix_str(f"{phase}, peak {_memory_text(peak_rss_bytes(), peak_cuda_bytes(device))}")

            report = upscale_clip(
                model, footage, writer, options, vae=vae, device=device, dtype=dtype,
                on_frame=lambda frame: bar.update(), on_step=show,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        writer.abort()
        raise KeyboardInterrupt(str(stop) or "Stopped. Nothing was left behind.") from None
    except BaseException:
        writer.abort()
        raise
    for note in () if args.json else report.notes:
        _say(f"Note: {note}")
    origin = {"input": args.input, "family": model.family, "version": model.version}
    _print_report(args, origin | dataclasses.asdict(report), f"{report.output}: {_run_text(report)}")
    if not report.complete:
        _say(f"Error: {report.notes[-1]} The frames read before that are in {report.output}.")
        return EXIT_BAD_INPUT
    return 0


def _run_folder(args: argparse.Namespace, options: StreamOptions) -> int:
    if args.vae is not None or args.image_sequence or args.keep_damaged:
        raise ValueError("a folder of videos: expected neither --vae nor --image-sequence nor --keep-damaged.")
    if args.start is not None or args.duration is not None:
        raise ValueError("a folder of videos: expected neither --start nor --duration; they are for one clip.")
    if args.download:
        _download(args)
    jobs = find_jobs(Path(args.input), Path(args.output), lambda text: _say(f"Note: {text}"))
    output = OutputOptions(args.codec, args.crf, args.ten_bit, preset=args.preset, threads=args.encoder_threads)
    cores = os.cpu_count() or 1
    every_card = args.device == "auto" and torch.cuda.is_available()
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if every_card else [choose_device(args.device)]
    settings = [
        WorkerSettings(
            str(device), str(args.model or NANO_FILE), options, output, args.version, args.lq_cache_order,
            args.precision, threads=max(1, cores // (args.workers or cores)),
        )
        for device in devices
    ]  # fmt: skip
    manifest = Manifest(Path(args.output), folder_settings(settings[0]))
    bars: dict[int, tqdm] = {}
    with tqdm(total=len(jobs), unit="clip", disable=None, desc="all", position=0) as total:

        def show(worker: int, name: str, done: int, frames: int | None) -> None:
            if worker not in bars:
                bars[worker] = tqdm(unit="frame", disable=None, leave=False, position=worker + 1)
            bar = bars[worker]
            bar.total, bar.n = frames, done
            bar.set_description(f"worker {worker}: {name}")

        def say(line: str) -> None:
            total.n = sum(manifest.finished(job) for job in jobs)
            total.refresh()
            line = _escaped(line)
            tqdm.write(line, file=sys.stderr)
            _log.info(line)

        run = FolderRun(tuple(jobs), tuple(settings), args.workers or None, args.force)
        try:
            report = run_folder(run, manifest, say, show)
        except KeyboardInterrupt:
            done = sum(manifest.finished(job) for job in jobs)
            text = f"Stopped. {done} of {len(jobs)} clips are done; run the same command again for the rest."
            raise KeyboardInterrupt(text) from None
        finally:
            for bar in bars.values():
                bar.close()
    _print_report(args, report.to_json(), report.table())
    return EXIT_MACHINE if report.failed or report.stopped else 0


def _download(args: argparse.Namespace) -> None:
    version = DOWNLOAD_VERSION if args.version == "auto" else args.version
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        try:
            download_flashvsr(version, args.model, progress=show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped. What was fetched stays; the same command goes on from there.") from None


def _print_report(args: argparse.Namespace, data: object, text: str) -> None:
    if args.json:
        print(json.dumps(data, indent=2))
    elif text:
        print(_escaped(text))
    _log.info(_escaped(text))


def _run_text(report: RunReport) -> str:
    return (
        f"{report.frames} frames of {report.width}x{report.height} in {report.seconds:.1f} s,"
        f" {report.frames_per_second:.2f} frames per second,"
        f" peak {_memory_text(report.peak_rss_bytes, report.peak_cuda_bytes)}"
    )


def _memory_text(rss: int, cuda: int | None) -> str:
    text = f"process RAM {rss / MIB:,.0f} MiB"
    return text if cuda is None else f"{text}, CUDA tensors {cuda / MIB:,.0f} MiB"


def _run_inspect(args: argparse.Namespace) -> int:
    reports, code = [], 0
    for file in args.files:
        try:
            reports.append(inspect_checkpoint(file))
        except (ValueError, OSError) as error:
            _say(f"Error: {_message(error)}")
            code = EXIT_BAD_INPUT
    # Line by line: a key with a line end in it must not look like a line of ours.
    texts = [printable(line, LINE_CHARACTERS) for report in reports for line in _checkpoint_lines(report)]
    _print_report(args, [dataclasses.asdict(report) for report in reports], "\n".join(texts))
    return code


def _checkpoint_lines(report: CheckpointReport) -> Iterator[str]:
    yield f"{report.path}: family {report.family or 'unknown'}, version {report.version or 'unknown'}"
    for file in report.files:
        known = f", the published {file.known_as}" if file.known_as else ""
        yield f"  file {Path(file.path).name}: {file.format}, {file.bytes:,} bytes{known}"
        yield f"    sha256 {file.sha256}"
    for part in report.parts:
        shape = f", shape {list(part.shape)}" if part.shape else ""
        size = f"{part.tensors} tensors, {part.parameters:,} parameters, {part.bytes:,} bytes"
        yield f"  {part.part} in {part.file}: {size} as {', '.join(part.dtypes)}{shape}"
        yield f"    version {part.version or 'unknown'}{f' ({part.how_known})' if part.how_known else ''}"
        if part.fingerprint:
            yield f"    fingerprint {part.fingerprint}"
        for label, keys in (("missing", part.missing), ("extra", part.extra), ("ignored", part.ignored)):
            if keys:
                more = " …" if len(keys) > LISTED_KEYS else ""
                yield f"    {len(keys)} {label} keys: {', '.join(keys[:LISTED_KEYS])}{more}"
    if report.absent:
        yield f"  absent: {', '.join(report.absent)}"
    for problem in report.unreadable:
        yield f"  unreadable: {problem}"


def _run_demo(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    model = load_flashvsr(NANO_FILE, dtype=dtype, device=device)
    with tqdm(unit="frame", disable=None, desc="demo") as bar:
        out, show = Path(args.out), lambda frame: bar.update()
        report = run_demo(out, args.seconds, model, device=device, dtype=dtype, on_frame=show)
    lines = (
        f"video:      {report.run.output}",
        f"comparison: {report.comparison} (input | bicubic | output | ground truth)",
        _run_text(report.run),
        f"bicubic: PSNR {report.bicubic_psnr:.2f} dB, SSIM {report.bicubic_ssim:.4f}",
        f"output:  PSNR {report.output_psnr:.2f} dB, SSIM {report.output_ssim:.4f}",
    )
    _print_report(args, dataclasses.asdict(report), "\n".join(lines))
    return 0


def _run_doctor(args: argparse.Namespace) -> int:
    device, target = choose_device(args.device), Path(args.json) if args.json else None
    if args.full:
        return _run_full_doctor(args, device, target)
    findings = examine(lambda: load_flashvsr(NANO_FILE, dtype=choose_dtype("auto", device), device="cpu"), device)
    if target is None:
        _print_report(argparse.Namespace(json=args.json is not None), findings.to_json(), "\n".join(findings.lines()))
    else:
        card.save(findings.to_json(), target)
        print("\n".join(findings.lines()))
    return findings.exit_code


def _run_full_doctor(args: argparse.Namespace, device: torch.device, target: Path | None) -> int:
    vectors = Path(__file__).parent / "tests" / "data" / "golden"
    setting = card.Setting(device, choose_dtype("auto", device), args.reduced, golden=vectors)

    def on_block(record: dict[str, Any]) -> None:
        _say(f"{list(record['blocks'])[-1]}: done")
        if target is not None:
            card.save(record, target)

    record = card.measure(setting, card.FULL, on_block)
    _print_report(argparse.Namespace(json=args.json == ""), record, card.page(record))
    return record["exit_code"]
