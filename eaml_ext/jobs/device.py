"""The device of a setting."""

import os

import torch


def torch_device(where: str, name: str) -> torch.device:
    """Return the device ``name``. For ``cuda`` without a number, the ranks of a machine use its GPUs in turn.

    Args:
        where: the start of error messages.
        name: ``cpu``, ``cuda`` or ``cuda:<n>``.

    Raises:
        ValueError: another name, or the machine has no such device.

    >>> torch_device("DynamicsConfig", "cpu")
    device(type='cpu')
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
