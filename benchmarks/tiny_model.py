"""The tiny random model under the name by which benchmarks and tests know it."""

from steadyvsr.app.card.random_model import TINY, parameters, tiny_model

__all__ = ["TINY", "parameters", "tiny_model"]
