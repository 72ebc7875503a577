"""The device a command works on."""

import torch

from ..errors import MasterKeysError


def check_device(device: str) -> None:
    """Raises MasterKeysError unless torch can compute there."""
    try:
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # of each backend its own
        raise MasterKeysError(f"torch cannot use the device '{device}': {str(error).splitlines()[0]}") from None
