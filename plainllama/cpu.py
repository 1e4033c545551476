"""What a CPU is fast at: vector code, bfloat16, and products and memory of small models."""

import ctypes
import os
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def vector_options() -> dict[str, bool]:
    """Return torch.compile's option that spares a second Python, which tries if vector code runs.

    It is for processors that have vector code: elsewhere the compiler would take it to be there.
    """
    return {"cpp.vec_isa_ok": True} if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else {}


def multiplies_bf16() -> bool:
    """Tell whether the CPU has instructions for bf16 products (torch has no public names)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def onednn_is_faster() -> bool:
    """Tell whether oneDNN multiplies faster than MKL, which leaves AMD's AVX-512 unused."""
    has = torch.cpu.get_capabilities()
    amd = str(has.get("cpu_name")).startswith("AMD")
    return amd and bool(has.get("avx512_f")) and not has.get("amx_tile")


def multiply_by_onednn(allowed: bool) -> bool:
    """Let oneDNN multiply float32 matrices, if allowed, where it is faster; tell whether it does.

    PyTorch asks it only where products may be rounded to bfloat16, which without AMX none is.
    """
    faster = allowed and onednn_is_faster()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if faster else "none"
    return faster


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: pages that the system gives again, it must first clear.

    What the environment says of malloc comes first. Other C libraries are left as they are.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
