"""What a MODEL's network is an instance of."""

import torch


class BaseModel(torch.nn.Module):
    pass
