"""Published files of weights, known by sha256: what a file is, and whether it still is what was published."""

from __future__ import annotations

from dataclasses import dataclass

from .weight_file import CheckpointError, WeightFile, file_sha256


@dataclass(frozen=True)
class KnownFile:
    """A published file.

    Attributes:
        version: of the transformer and the LQ projection in it; None where the releases share the file.
        size_slack_bytes: how far the size may be off; the hash decides.
    """

    name: str
    sha256: str
    size_bytes: int
    version: str | None
    size_slack_bytes: int = 0


# The transformer and projection of v1 are missing: no published hash of them was found.
KNOWN_FILES = (
    KnownFile(
        "JunhaoZhuang/FlashVSR-v1.1 diffusion_pytorch_model_streaming_dmd.safetensors",
        "bd28180edcf3446c028e32fc6b731a80bf7e4da2ab4caac3186b9499964d37be",
        5676070392,
        "v1.1",
    ),
    KnownFile(
        "JunhaoZhuang/FlashVSR-v1.1 LQ_proj_in.ckpt",
        "d6d011cdaaba6a52645086caa08fa04124e746f6ca568140a24007591142bfd2",
        575694948,
        "v1.1",
    ),
    KnownFile(
        "JunhaoZhuang/FlashVSR-v1.1 TCDecoder.ckpt",
        "e224bdcf2f52745cbf4d393ff5374c2ba09e90285d5d19062d2bf63b915b6161",
        189018333,
        None,
    ),
    KnownFile(
        "JunhaoZhuang/FlashVSR-v1.1 Wan2.1_VAE.pth",
        "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
        507609880,
        None,
    ),
    KnownFile(
        "OpenImagingLab/FlashVSR posi_prompt.pth",
        "4601107a11e4e11a936a6b79df579e54dbc99872132bf542151f0ffd65b4b1ef",
        4195504,
        None,
    ),
    KnownFile(
        "ausboss/FlashVSR-v1.1-ComfyUI (all parts, fp16)",
        "dd833652205e2efdb6d524a669908156b13620e77b8b3f2aedfcc3086eae1569",
        3508600000,  # counted from the tensors; the exact size is not published
        "v1.1",
        size_slack_bytes=2000000,
    ),
)


def known_file(file: WeightFile) -> KnownFile | None:
    """The published file that this one is a copy of, by sha256; hashes it only if the size fits."""
    fitting = [known for known in KNOWN_FILES if abs(known.size_bytes - file.size_bytes) <= known.size_slack_bytes]
    digest = file_sha256(file.path) if fitting else None
    return next((known for known in fitting if known.sha256 == digest), None)


def refuse_altered(file: WeightFile, version: str | None = None) -> None:
    """Raises a CheckpointError for a file with the name and size of a published one and another hash.

    Args:
        version: of FlashVSR, that it is loaded as; None where it has none. No hashes of v1 are published: its files may
            differ from those of v1.1.
    """
    for known in KNOWN_FILES:
        named = known.name.split()[-1] == file.path.name and known.size_bytes == file.size_bytes
        if named and known.version in (None, version) and known_file(file) is None:
            raise CheckpointError(
                f"{file.path}: expected the published {known.name} with sha256 {known.sha256}; got "
                f"{file_sha256(file.path)}. It is damaged or was altered: fetch it again. A model of your own needs "
                f"another file name."
            )
