"""The clock of a container: where it starts, and where it jumps because recordings were joined or a signal was lost."""

from __future__ import annotations

from fractions import Fraction

from av.container import InputContainer

_TS_DISCONT = 0x200  # AVFMT_TS_DISCONT of libavformat
JUMP_SECONDS = 10
"""A longer gap is a jump of the clock, as for FFmpeg's own tool (-dts_delta_threshold)."""
STEP_BACK_SECONDS = Fraction(1, 2)
"""So far back goes no clock that only jitters."""


def time_origin(container: InputContainer) -> Fraction:
    """The container's time that counts as 0 s: MPEG-TS starts anywhere, and audio priming before 0 shifts nothing."""
    starts = [
        s.start_time * s.time_base
        for s in container.streams
        if s.type in ("video", "audio") and s.start_time is not None and s.time_base is not None
    ]
    return max(Fraction(0), min(starts, default=Fraction(0)))


def has_joined_clock(container: InputContainer) -> bool:
    """Whether the container's clock may jump by its format's rules: transport and program streams."""
    return bool(int(container.format.flags) & _TS_DISCONT)


class JoinedClock:
    """The times of one stream with the jumps of its clock taken out; the times as they are in other formats.

    Attributes:
        jumps: how many so far.
    """

    def __init__(self, container: InputContainer):
        self.jumps = 0
        self._may_jump = has_joined_clock(container)
        self._shift = Fraction(0)
        self._last: Fraction | None = None
        self._step = Fraction(0)

    def moved(self, time: Fraction, duration: Fraction) -> Fraction:
        """The time of the next packet or frame, in seconds, without the jumps before it.

        Args:
            duration: of this packet or frame, after which the next one follows where the clock jumps.
        """
        time += self._shift
        if self._may_jump and self._last is not None and not (-STEP_BACK_SECONDS < time - self._last <= JUMP_SECONDS):
            self.jumps += 1
            self._shift += self._last + self._step - time
            time = self._last + self._step
        self._last, self._step = time, duration
        return time
