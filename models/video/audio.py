"""The sound of the source clip in the output: copied packet by packet, re-encoded only where the container must."""

from __future__ import annotations

import io
import logging
from contextlib import suppress
from fractions import Fraction
from itertools import islice

import av
from av.container import OutputContainer
from av.error import FFmpegError

from .reader import Clip
from .source import open_container
from .timeline import JoinedClock, time_origin
from .waveform import BITS_PER_SECOND

log = logging.getLogger("steadyvsr.video")

_LOOKED_AT_PACKETS, _TRIED_PACKETS = 1000, 2
_CUSTOMARY_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}


class AudioCopy:
    """Copies all audio streams of a clip into an output container.

    Make it before the container's header is written, since it adds the streams; then call `advance` as the video's time
    goes on, so that sound and picture are interleaved in the file. It opens the source for itself.

    Attributes:
        notes: what a user should be told (a stream that had to be re-encoded).
    """

    def __init__(self, clip: Clip, output: OutputContainer):
        self._output = output
        self._clip = clip
        self._input = open_container(clip.source)
        self.notes: list[str] = []
        self._done = False
        self._waiting: av.Packet | None = None
        self._origin = time_origin(self._input) + clip.start
        self._targets: dict[int, tuple] = {}
        self._clocks: dict[int, JoinedClock] = {}
        decodable = [stream for stream in self._input.streams.audio if stream.codec_context is not None]
        if len(decodable) < len(self._input.streams.audio):
            self.notes.append("an audio stream in an unknown codec was left out")
        # FFmpeg learns both from the first packets, and finds neither in damaged ones.
        known = [stream for stream in decodable if stream.codec_context.channels and stream.codec_context.sample_rate]
        if len(known) < len(decodable):
            self.notes.append("an audio stream without readable sound was left out")
        first = _first_packets(clip, [stream.index for stream in known])
        for stream in known:
            self._targets[stream.index] = self._target(stream, first[stream.index])
            self._clocks[stream.index] = JoinedClock(self._input)
        if clip.start:
            self._input.seek(int(self._origin * av.time_base))
        self._packets = self._input.demux(known) if known else iter(())  # demux([]) means all streams

    def _target(self, stream, first: list[av.Packet]) -> tuple:
        name = self._output.format.name
        if _container_holds(name, stream, first):
            target = self._output.add_stream_from_template(stream)
            encoded = False
        else:
            codec, rate = ("libopus", 48_000) if name == "webm" else ("aac", stream.rate)
            target = self._output.add_stream(codec, rate=rate, layout=_layout(stream, codec))
            target.bit_rate = BITS_PER_SECOND
            encoded = True
            self.notes.append(f"audio re-encoded from {stream.codec_context.name} to {codec}: {name} cannot hold it")
        if "language" in stream.metadata:
            target.metadata["language"] = stream.metadata["language"]
        return target, encoded

    def advance(self, until: Fraction | None) -> None:
        """Writes the packets that begin before `until` seconds of the window; None writes all that are left."""
        while not self._done:
            waiting, self._waiting = self._waiting, None
            packet = waiting or self._next_packet()
            if packet is None:
                self._finish()
                return
            if packet.dts is None:
                continue
            if packet is not waiting:
                self._close_up(packet)
            begin = packet.dts * packet.time_base - self._origin
            if self._clip.start and begin < 0:
                continue
            if self._clip.window is not None and begin >= self._clip.window:
                self._finish()
                return
            if until is not None and begin >= until:
                self._waiting = packet
                return
            self._write(packet)

    def close(self) -> None:
        """Closes the source. Streams that were re-encoded are complete only after `advance(None)`."""
        self._input.close()

    def _next_packet(self) -> av.Packet | None:
        try:
            return next(self._packets, None)
        except FFmpegError as error:
            # The reader of the pictures reports damaged files; here it only means that the sound ends.
            log.warning("%s: the audio ends early: %s", self._clip.name, error.strerror)
            return None

    def _close_up(self, packet: av.Packet) -> None:
        """Takes the jumps of the source's clock out of a packet's times, as the reader does for the pictures."""
        assert packet.dts is not None and packet.time_base is not None
        time = packet.dts * packet.time_base
        duration = max(1, packet.duration or 0) * packet.time_base
        ticks = round((self._clocks[packet.stream.index].moved(time, duration) - time) / packet.time_base)
        packet.dts += ticks
        if packet.pts is not None:
            packet.pts += ticks

    def _write(self, packet: av.Packet) -> None:
        target, encoded = self._targets[packet.stream.index]
        if encoded:
            try:
                frames = packet.decode()
            except FFmpegError as error:
                log.warning("%s: audio packet left out: %s", self._clip.name, error.strerror)
                return
            for frame in frames:
                frame.pts = round((frame.pts * frame.time_base - self._origin) * frame.sample_rate)
                frame.time_base = Fraction(1, frame.sample_rate)
                self._output.mux(target.encode(frame))
            return
        shift = round(self._origin / packet.time_base)
        assert packet.dts is not None  # advance() leaves the others out
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        packet.stream = target
        self._output.mux(packet)

    def _finish(self) -> None:
        self._done = True
        for target, encoded in self._targets.values():
            if encoded:
                self._output.mux(target.encode(None))


def _layout(stream, codec: str) -> str:
    """The stream's channel layout, or the customary one where the file only counts channels ("2 channels").

    Opus has no layouts with speakers at the side.
    """
    name: str = stream.layout.name
    if name.endswith("channels") or codec == "libopus":
        return _CUSTOMARY_LAYOUTS.get(stream.layout.nb_channels, name)
    return name


def _first_packets(clip: Clip, streams: list[int]) -> dict[int, list[av.Packet]]:
    """Index of each of these streams → its first packets, of those at the beginning of the file."""
    found: dict[int, list[av.Packet]] = {index: [] for index in streams}
    if not found:
        return found
    # What is damaged is met again, and told of, on the way.
    with open_container(clip.source) as container, suppress(FFmpegError):
        for packet in islice(container.demux(), _LOOKED_AT_PACKETS):
            if packet.stream.index in found and packet.dts is not None:
                found[packet.stream.index].append(packet)
            if all(len(packets) >= _TRIED_PACKETS for packets in found.values()):
                break
    return found


def _container_holds(format_name: str, stream, packets: list[av.Packet]) -> bool:
    """Whether a container accepts the stream as it is; found out by writing a file with its first packets alone.

    Some refuse it at the end only: an MP4 with PCM whose file just counts the channels. A stream that begins late is
    not known to be accepted.
    """
    try:
        with av.open(io.BytesIO(), "w", format=format_name) as trial:
            target = trial.add_stream_from_template(stream)
            origin = packets[0].dts or 0
            for packet in packets:
                packet.pts = packet.dts = (packet.dts or 0) - origin
                packet.stream = target
                trial.mux(packet)
    except (FFmpegError, ValueError, IndexError):
        return False
    return True
