"""The device that a setting names."""

import os

import torch


def torch_device(where: str, name: str) -> torch.device:
    """``name`` as a device that is there; ValueError, a sentence that begins with ``where``, for any other.

    The processes that torchrun has started on one machine take its GPUs in turn for ``cuda`` without a number.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{where}: device must be cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{where}: device is {name}, but torch sees no CUDA device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is None and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % count)
        if (device.index or 0) >= count:
            raise ValueError(f"{where}: device is {name}, but torch sees {count} CUDA devices")
    return device
