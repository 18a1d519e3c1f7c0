"""What a CUDA device would hold, from a forecast: a model of the caching allocator, and what the forecast does not see.

NOT CALIBRATED: no figure here was fitted to a GPU, and none is invented. `Device` takes the terms that only a measurement gives (context,
workspaces), and says whether somebody measured them. `tools/gpu_checks.py` measures them where there is a GPU.

What is modelled, because it is documented: PyTorch's caching allocator hands out blocks in multiples of 512 bytes, and
`torch.cuda.max_memory_allocated` counts those blocks (PyTorch, "CUDA semantics", memory management; `kMinBlockSize` in
`c10/cuda/CUDACachingAllocator`). Fragmentation and the reserved segments that `nvidia-smi` shows are not modelled.

What kernels do otherwise on CUDA than on the CPU, and the forecast therefore leaves out:

- Attention: the forecast runs the CPU's flash kernel, which keeps the output and a log-sum-exp a query, as CUDA's flash and efficient ones
  do; with a float mask, or a head width they refuse, CUDA may take the math kernel, which keeps the whole score matrix.
- Convolutions: cuDNN takes a workspace inside the operator, whose size depends on the algorithm it picks. `workspace_bytes` is its place.
- Dropout: CUDA's fused kernel keeps a mask of a byte an element, the CPU a float's four; so the forecast is high there.
- Optimizers: on CUDA torch's default is the for-each form, whose passing results are as large as all gradients together.
- Autocast: CUDA and CPU cast different operators (layer norm and softmax run in float32 under CUDA autocast).
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.cost.errors import CostError
from graphopt.cost.figures import Cost

#: bytes; the caching allocator's smallest block, and the multiple that all blocks come in
BLOCK = 512


def rounded(size: int) -> int:
    """Bytes of the allocator's block for `size` bytes."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Device:
    """A CUDA device as far as memory goes.

    Attributes:
        name: for people.
        context_bytes: what the process holds before its first tensor (context, kernels). Unknown until measured.
        workspace_bytes: the most that kernels take inside one operator on the models that were measured. Unknown until measured.
        measured: where the two come from: device, versions, date; None: not calibrated.
    """

    name: str = "CUDA"
    context_bytes: int | None = None
    workspace_bytes: int | None = None
    measured: str | None = None

    @property
    def calibrated(self) -> bool:
        return self.measured is not None

    def __post_init__(self) -> None:
        if self.calibrated and (self.context_bytes is None or self.workspace_bytes is None):
            raise CostError("a calibrated device has measured context and workspaces", fix="Give both, or leave `measured` out")


@dataclass(frozen=True)
class DeviceMemory:
    """A forecast for a device.

    Attributes:
        allocated_bytes: the allocator's blocks at the peak: what `torch.cuda.max_memory_allocated` would show, workspaces aside
            where they are unknown.
        process_bytes: with the context; None while that is unknown.
        state: "calibrated: ..." or "not calibrated".
    """

    allocated_bytes: int
    process_bytes: int | None
    state: str


def on_device(cost: Cost, device: Device = Device()) -> DeviceMemory:
    """What one training step would hold on a CUDA device, as far as the model goes."""
    allocated = cost.peak_block_bytes + (device.workspace_bytes or 0)
    process = None if device.context_bytes is None else allocated + device.context_bytes
    state = f"calibrated: {device.measured}" if device.calibrated else "not calibrated"
    return DeviceMemory(allocated, process, state)
