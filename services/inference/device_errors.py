"""What went wrong on the device: out of memory, which passes, or a lost device, which does not.

Told by name and text, so that this needs no device.
"""

import gc

import torch

_LOST = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ECC error",
    "CUDA error: unknown error",
    "device is lost",
)
"""After one of these every later call on the device fails: only a new process helps."""


def is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def is_lost(error: BaseException) -> bool:
    """Whether the device can no longer be used by this process."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(each in text for each in _LOST)


def free() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
