"""State dicts of Wan 2.1 VAEs: finding the official keys in them, and naming what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

# Under which packs and merged files store the official keys.
PREFIXES = ("", "vae.", "first_stage_model.", "model.")


def strip_prefix(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`sd` under the official keys; a key that lacks the prefix of the others is left as it is.

    Raises:
        ValueError: no Wan 2.1 VAE under any known prefix.
    """
    for prefix in PREFIXES:
        if f"{prefix}decoder.head.2.weight" in sd and f"{prefix}conv2.weight" in sd:
            return {key.removeprefix(prefix): value for key, value in sd.items()}
    found = ", ".join(list(sd)[:5]) or "none"
    raise ValueError(
        f"Wan VAE: expected the keys of a Wan 2.1 VAE (decoder.head.2.weight, conv2.weight, …); got {len(sd)} keys: "
        f"{found}{', …' if len(sd) > 5 else ''}. Choose a Wan 2.1 VAE file."
    )


def read_sizes(sd: Mapping[str, Tensor]) -> tuple[int, int]:
    """(dim, z_dim) of the VAE with these official keys.

    Raises:
        ValueError: the two tensors that tell them are not convolutions over time.
    """
    head, latent = sd["decoder.head.2.weight"], sd["conv2.weight"]
    if head.ndim != 5 or latent.ndim != 5:
        raise ValueError(
            f"Wan VAE: expected 5-D decoder.head.2.weight and conv2.weight; got shapes {tuple(head.shape)} and "
            f"{tuple(latent.shape)}. Choose a Wan 2.1 VAE file."
        )
    return head.shape[1], latent.shape[1]


def check_keys(module: nn.Module, sd: Mapping[str, Tensor]) -> None:
    """Compares names and shapes of `sd` with those of `module`.

    Raises:
        ValueError: lists every missing, unexpected and misshapen key.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [f"missing {key}" for key in expected if key not in sd]
    problems += [f"unexpected {key}" for key in sd if key not in expected]
    problems += [
        f"{key}: shape {tuple(sd[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in sd and tuple(sd[key].shape) != shape
    ]
    if problems:
        raise ValueError(
            f"Wan VAE: expected the {len(expected)} tensors of a Wan 2.1 VAE; got {len(sd)} with "
            f"{len(problems)} differences. Choose another file. " + "; ".join(problems)
        )
