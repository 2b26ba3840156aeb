"""A simulated card of a few megabytes inside a real ComfyUI on the CPU, and small random models that its loaders take.

`torch.device("cpu:0")` is not `torch.device("cpu")`, but tensors sent there stay ordinary: with ComfyUI's questions
about its device answered accordingly, its own code walks its branches for an accelerator. What is resident there is
known from ComfyUI's books alone, and a probe that reads these books is put in place of the process' own.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae as wan_vae
import comfy.model_management as mm
import comfy.ops
import comfy.sd
import safetensors
import torch
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file
from small_vaes import WAN_VAE_SIZES

FILES = {
    "diffusion_model": "tiny_wan.safetensors",
    "lora": "tiny_lora.safetensors",
    "clip": "tiny_umt5.safetensors",
    "vae": "tiny_wan_vae.safetensors",
}
FOLDERS = {"diffusion_model": "diffusion_models", "lora": "loras", "clip": "text_encoders", "vae": "vae"}
TEXT_OPTIONS = "model_options"


class SimulatedCard:
    """A card by ComfyUI's books, and the probe that reads them.

    Attributes:
        device: `cpu:0`.
        devices: all cards, here that one.
        capacity: bytes.
    """

    def __init__(self, capacity: int, *devices: torch.device) -> None:
        self.devices = list(devices) or [torch.device("cpu:0")]
        self.device = self.devices[0]
        self.capacity = capacity
        self._peak = 0

    def used(self, device: torch.device | None = None) -> int:
        return sum(
            loaded.model_loaded_memory()
            for loaded in mm.current_loaded_models
            if loaded.device == (device or self.device) and loaded.model is not None
        )

    def free(self, device: torch.device) -> int:
        return max(0, self.capacity - self.used(device))

    def sample(self, device: Any, *, settled: bool = False) -> Any:
        reading = next(module for name, module in list(sys.modules.items()) if name.endswith(".memory.reading"))
        if str(device) != str(self.device):
            return reading.Reading(str(device))
        used = self.used()
        self._peak = max(self._peak, used)
        now = reading.exact(used, "books")
        return reading.Reading(
            str(device),
            allocated=now,
            peak=reading.exact(self._peak, "books"),
            reserved=now,
            process=now,
            used=reading.Figure(used, "books", reading.WHOLE_DEVICE),
            total=reading.exact(self.capacity, "capacity"),
        )

    def reset_peak(self, device: Any) -> None:
        self._peak = self.used()

    def synchronise(self, device: Any) -> None:
        pass

    def install(self) -> None:
        """Makes it ComfyUI's device and its reading the process' own. There is no way back."""
        ask = {name: getattr(mm, name) for name in ("get_free_memory", "get_total_memory")}

        def answer(name: str, amount: Any) -> Any:
            def asked(device: Any = None, also_torch: bool = False, **more: Any) -> Any:
                also_torch = also_torch or any(more.values())
                device = self.device if device is None else device
                if device not in self.devices:
                    return ask[name](device, also_torch)
                return (amount(device), amount(device)) if also_torch else amount(device)

            return asked

        mm.get_torch_device = lambda: self.device
        if hasattr(mm, "get_all_torch_devices"):  # since 0.33
            mm.get_all_torch_devices = lambda *_, **__: list(self.devices)
        mm.text_encoder_device = lambda: self.device
        mm.get_free_memory = answer("get_free_memory", self.free)
        mm.get_total_memory = answer("get_total_memory", lambda device: self.capacity)
        load = mm.LoadedModel.model_load

        def model_load(loaded: Any, *arguments: Any, **keywords: Any) -> Any:
            result = load(loaded, *arguments, **keywords)
            listed = any(item is loaded for item in mm.current_loaded_models)
            mine = loaded.model_loaded_memory() if loaded.device == self.device and not listed else 0
            self._peak = max(self._peak, self.used() + mine)
            return result

        mm.LoadedModel.model_load = model_load
        state = sys.modules.setdefault("steadyvsr_state", types.ModuleType("steadyvsr_state"))
        vars(state)["probe"] = self


def take_small_models() -> None:
    """Lets the stock loaders take the small text encoder, whose options lie in its file; 0.3.64 also the small VAE."""
    load_clip = comfy.sd.load_clip

    def with_options(ckpt_paths: list[str], *arguments: Any, **keywords: Any) -> Any:
        with safetensors.safe_open(ckpt_paths[0], "pt") as file:
            stored = json.loads((file.metadata() or {}).get(TEXT_OPTIONS, "{}"))
        keywords["model_options"] = {**(keywords.get("model_options") or {}), **stored}
        return load_clip(ckpt_paths, *arguments, **keywords)

    comfy.sd.load_clip = with_options
    whole = wan_vae.WanVAE
    if "image_channels" not in inspect.signature(whole.__init__).parameters:
        wan_vae.WanVAE = lambda **keywords: whole(**{**keywords, "dim": 8})


def write_models(base: Path) -> dict[str, str]:
    """Writes the files below `base`/models unless they are there; names as the loaders list them."""
    paths = {kind: base / "models" / FOLDERS[kind] / name for kind, name in FILES.items()}
    if all(path.is_file() for path in paths.values()):
        return FILES
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    save_file(_diffusion_model(generator), paths["diffusion_model"])
    save_file(_lora(generator), paths["lora"])
    save_file(_vae(generator), paths["vae"])
    tensors, options = _text_encoder(generator)
    save_file(tensors, paths["clip"], metadata={TEXT_OPTIONS: json.dumps(options)})
    return FILES


def _diffusion_model(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = WanModel(
        model_type="t2v", dim=128, ffn_dim=128, num_heads=1, num_layers=1, in_dim=16, out_dim=16, device="meta",
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    ).state_dict()  # fmt: skip
    return {name: (torch.randn(x.shape, generator=generator) * 0.02).half() for name, x in shapes.items()}


def _lora(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"lora_down": (4, 128), "lora_up": (128, 4)}
    return {
        f"diffusion_model.blocks.0.{layer}.{side}.weight": torch.randn(shape, generator=generator) * 0.1
        for layer in ("self_attn.q", "ffn.0")
        for side, shape in shapes.items()
    }


def _vae(generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = {}
    for name, value in wan_vae.WanVAE(**WAN_VAE_SIZES).state_dict().items():
        if "gamma" in name:
            made[name] = torch.ones(value.shape)
        elif name.endswith("bias"):
            made[name] = torch.zeros(value.shape)
        else:
            made[name] = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
    return made


def _text_encoder(generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict]:
    sentencepiece = importlib.import_module("sentencepiece")
    written = io.BytesIO()
    lines = (f"a red cat number {index} sits on the mat of the house" for index in range(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=written, vocab_size=96, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    words = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).get_piece_size()

    def weights(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    block, attention, dense = "encoder.block.0.", "layer.0.SelfAttention", "layer.1.DenseReluDense"
    tensors = {
        "shared.weight": weights(words, 4096),
        "encoder.final_layer_norm.weight": torch.ones(4096).half(),
        f"{block}layer.0.layer_norm.weight": torch.ones(4096).half(),
        **{f"{block}{attention}.{part}.weight": weights(32, 4096) for part in "qkv"},
        f"{block}{attention}.o.weight": weights(4096, 32),
        f"{block}{attention}.relative_attention_bias.weight": weights(32, 1),
        f"{block}layer.1.layer_norm.weight": torch.ones(4096).half(),
        **{f"{block}{dense}.{part}.weight": weights(32, 4096) for part in ("wi_0", "wi_1")},
        f"{block}{dense}.wo.weight": weights(4096, 32),
        # By this key of no bytes both versions know the size of text encoder that Wan has.
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.empty(10240, 0, 4096).half(),
        "spiece_model": torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8),
    }
    sizes = {"num_layers": 1, "d_ff": 32, "num_heads": 1, "d_kv": 32, "vocab_size": words}
    return tensors, {"umt5xxl_model_config": sizes}
