"""The Triton backend without a card: run in Triton's interpreter, and compiled ahead of time for cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steadyvsr.models.flashvsr import attention

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
CPU = torch.device("cpu")
ALIGNED = [["tt.divisibility", 16]]
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 120: 101376}
"""Bytes of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide)."""
INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


def test_in_the_interpreter_every_case_gives_the_exact_result() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    cases = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and cases and int(cases[1]) >= 7, done.stdout + done.stderr


def test_asked_for_on_the_cpu_it_is_an_error_in_one_sentence() -> None:
    attention.choose_backend.cache_clear()
    with pytest.raises(attention.AttentionBackendError, match="expected the triton backend to work on cpu"):
        attention.choose_backend("triton", CPU, torch.float32)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiled_for_a_card_it_spills_no_registers_and_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int
) -> None:
    """In bf16 at the model's head dim, as it runs there."""
    from steadyvsr.models.flashvsr import triton_attention
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_attention._attend
    pointers = dict.fromkeys(("Q", "K", "V", "Out"), "*bf16")
    pointers |= dict.fromkeys(("Lists", "Counts", "Offsets"), "*i32") | {"Partial": "*fp32", "Scalars": "*fp32"}
    constants = {"BLOCK": 128, "HEAD_DIM": 128, "TILE": triton_attention.TILE, "SEARCH": 10}
    numbers = {"scale_log2": "fp32", "query_blocks": "i32", "key_blocks": "i32", "rows": "i32"}
    source = ASTSource(
        fn=kernel,
        signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): ALIGNED for name in pointers},
    )
    options = {"num_warps": triton_attention.WARPS, "num_stages": triton_attention.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    assert (registers <= 255, stack) == (True, 0), usage
    assert registers * 32 * triton_attention.WARPS <= 65536, "one block has all registers of a multiprocessor"
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
