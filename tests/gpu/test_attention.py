"""The attention backends on a card: each passes the self-check that stands before its use."""

from __future__ import annotations

import pytest
import torch
from steadyvsr.models.flashvsr import attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backends_pass_their_self_check_on_the_gpu(backend: str, dtype: torch.dtype) -> None:
    assert attention.self_check(backend, torch.device("cuda"), dtype) is None
