"""Where the models run and in which precision, when the caller does not say."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from hired.errors import ConfigurationError

FIRST_BFLOAT16_GPU = (8, 0)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The given device, else the current GPU, else the CPU."""
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigurationError(f"{device!r} is no device; use cpu, cuda or cuda:N") from error


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The given dtype, else float32 on CPUs, bfloat16 on GPUs that have it, float16 on older ones."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return (
            torch.bfloat16
            if torch.cuda.get_device_capability(device) >= FIRST_BFLOAT16_GPU
            else torch.float16
        )
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigurationError(f"{dtype!r} is no precision to run in; use float32, bfloat16 or float16")
    return resolved


def resolve_handoff_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Features travel as float16, half the bytes; as float32 when the caller asks for float32 throughout."""
    return torch.float32 if dtype in (torch.float32, "float32") else torch.float16


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on the device, there when the current stream comes to it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def describe_hardware(device: str | torch.device) -> str:
    """The GPU, or the processor and the cores that this process may use, in words for a results file."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = "AMX" if any("amx_bf16" in line for line in lines) else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(filter(None, [f"{cores} cores", *names[:1], features]))


def host_memory_bytes() -> int:
    """The memory that this process may use on its host: the machine's, or its control group's if less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(file).read_text(encoding="utf-8")))
    return min(limits)
