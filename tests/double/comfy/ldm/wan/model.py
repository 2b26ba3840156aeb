"""The diffusion model; no test samples on the double."""

import torch


class WanModel(torch.nn.Module):
    pass
