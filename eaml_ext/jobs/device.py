"""The device that a setting names."""

import torch


def torch_device(where: str, name: str) -> torch.device:
    """``name`` as a device that is there; ValueError, a sentence that begins with ``where``, for any other."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{where}: device must be cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{where}: device is {name}, but torch sees no CUDA device")
    return device
