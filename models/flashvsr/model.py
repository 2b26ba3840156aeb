"""The three networks and the prompt of one FlashVSR checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .lq_projection import CausalLQ4xProjection
from .tc_decoder import TCDecoder
from .transformer import Transformer


@dataclass(frozen=True)
class FlashVSR:
    """Weights only; running a clip changes nothing here.

    Attributes:
        transformer, lq_projection, decoder: the networks.
        prompt: the fixed prompt embedding that the weights were trained with, BLD with B = 1, on the device and in the
            dtype that the weights were loaded for.
        version: "v1" or "v1.1": which projection the weights were trained with.
        family: the weights' name, such as "flashvsr" or "nano".
    """

    transformer: Transformer
    lq_projection: CausalLQ4xProjection
    decoder: TCDecoder
    prompt: Tensor
    version: str
    family: str
