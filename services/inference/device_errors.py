"""What went wrong on the device: out of memory, which passes, or a lost device, which does not.

Told by name and text, so that this needs no device.
"""

from services.inference.engine.out_of_memory import OUT_OF_MEMORY, free, is_out_of_memory, refusal

__all__ = ["OUT_OF_MEMORY", "free", "is_lost", "is_out_of_memory", "refusal"]

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


def is_lost(error: BaseException) -> bool:
    """Whether the device can no longer be used by this process."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(each in text for each in _LOST)
