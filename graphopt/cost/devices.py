"""GPUs by name: how much memory a process gets there, and peak rates.

Memory is the least "total capacity" in torch's own out-of-memory messages that the public trackers hold for the device; it is less than
the name says, because firmware and error correction take their share. Rates are the makers' peaks, dense, without sparsity.
"""

from dataclasses import dataclass

from graphopt.errors import CostError, did_you_mean

GIB = 2**30
#: bytes of the CUDA context of one process: what processes held beyond torch's own in six out-of-memory messages, 0.23 to 0.50 GiB
#: (A100, RTX 4090, L4 and others; torch 2.1 to 2.9). With NCCL it is more, and was not found.
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        capability: its compute capability.
        memory: bytes that CUDA reports as its total.
        bfloat16, tf32, float32: peak FLOP/s of tensor cores with 16-bit types (float32 accumulation) and TF32, and of plain float32.
        bandwidth: peak bytes per second of its memory.
        source: of the figures.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bfloat16: float
    tf32: float
    float32: float
    bandwidth: float
    source: str

    @property
    def usable(self) -> int:
        """Bytes that the caching allocator of a single process can get: the memory without the context."""
        return self.memory - CONTEXT

    @property
    def blas_workspace(self) -> int:
        """Bytes that cuBLAS keeps per handle and stream, in torch: 32 MiB on Hopper, else twice 4 MiB and eight times 16 KiB."""
        return 4096 * 8 * 1024 if self.capability[0] == 9 else 4096 * 2 * 1024 + 16 * 8 * 1024


DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100", (8, 0), int(79.14 * GIB), 312e12, 156e12, 19.5e12, 2.039e12,
            "SXM, 80 GB. Rates: NVIDIA A100 datasheet. Memory: Kwai-Keye/Keye#11, 79.14 GiB",
        ),
        Device(
            "H100", (9, 0), int(79.11 * GIB), 989.5e12, 494.5e12, 67e12, 3.35e12,
            "SXM, 80 GB. Rates: NVIDIA H100 datasheet (half of those with sparsity). Memory: vllm#27508, 79.11 GiB",
        ),
        Device(
            "H200", (9, 0), int(139.72 * GIB), 989.5e12, 494.5e12, 67e12, 4.8e12,
            "SXM, 141 GB. Rates: NVIDIA H200 datasheet (half of those with sparsity). Memory: 139.72 to 139.81 GiB in public logs",
        ),
        Device(
            "RTX 4090", (8, 9), int(23.52 * GIB), 165.2e12, 82.6e12, 82.6e12, 1.008e12,
            "24 GB. Rates: NVIDIA Ada architecture whitepaper. Memory: Soul-AILab/SoulX-FlashTalk#5, 23.52 GiB (23.64 in others)",
        ),
        Device(
            "L4", (8, 9), int(22.03 * GIB), 121e12, 60e12, 30.3e12, 0.3e12,
            "24 GB. Rates: NVIDIA L4 datasheet (half of those with sparsity). Memory: ArcInstitute/evo2#190, 22.03 GiB",
        ),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """A device by its name, case ignored, with or without "NVIDIA". Raises CostError if it is not in the table."""
    wanted = " ".join(name.casefold().replace("nvidia", "").replace("geforce", "").split())
    for known, device in DEVICES.items():
        if known.casefold() == wanted or known.casefold().removeprefix("rtx ") == wanted:
            return device
    guess = did_you_mean(name, DEVICES)
    raise CostError(f"no device is called {name!r}", fix=guess or f"Known are {', '.join(DEVICES)}")
