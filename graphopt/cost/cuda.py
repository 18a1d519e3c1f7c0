"""Memory of a CUDA device, from a forecast: a model of the caching allocator, and a list of what the forecast leaves out.

NOT CALIBRATED: no figure here was fitted to a GPU. `Device` takes the terms that only a measurement gives (context, workspaces), and
records whether they were measured. `tools/gpu_checks.py` measures them on a GPU.

The model follows the documentation: PyTorch's caching allocator allocates blocks in multiples of 512 bytes, and
`torch.cuda.max_memory_allocated` counts those blocks (PyTorch, "CUDA semantics", memory management; `kMinBlockSize` in
`c10/cuda/CUDACachingAllocator`). Fragmentation and the reserved segments that `nvidia-smi` shows are not modelled.

Kernels differ between CUDA and the CPU, which the forecast does not model:

- Attention: the forecast runs the CPU's flash kernel, which saves the output and one log-sum-exp per query, as CUDA's flash and efficient
  kernels do. With a float mask, or a head width that those do not support, CUDA may use the math kernel, which saves the score matrix.
- Convolutions: cuDNN allocates a workspace inside the operator, whose size depends on the algorithm. `workspace_bytes` accounts for it.
- Dropout: CUDA's fused kernel saves a mask of one byte per element, the CPU one of four; so the forecast is high there.
- Optimizers: on CUDA torch's default is the for-each form, whose temporary results are as large as all gradients together.
- Autocast: CUDA and CPU cast different operators (layer norm and softmax run in float32 under CUDA autocast).
"""

from dataclasses import dataclass

from graphopt.cost.figures import Cost
from graphopt.errors import CostError

#: bytes of the caching allocator's smallest block; all blocks are multiples of it
BLOCK = 512


@dataclass(frozen=True)
class Device:
    """The memory figures of a CUDA device.

    Attributes:
        context_bytes: what the process holds before its first tensor (context, kernels). Unknown until measured.
        workspace_bytes: the most that kernels allocate inside one operator on the models that were measured. Unknown until measured.
        measured: the source of the two: device, versions, date; None: not calibrated.
    """

    name: str = "CUDA"
    context_bytes: int | None = None
    workspace_bytes: int | None = None
    measured: str | None = None

    def __post_init__(self) -> None:
        if self.measured is not None and (self.context_bytes is None or self.workspace_bytes is None):
            raise CostError("a calibrated device has measured context and workspaces", fix="Give both, or leave `measured` out")


@dataclass(frozen=True)
class DeviceMemory:
    """A forecast for a device.

    Attributes:
        allocated_bytes: the allocator's blocks at the peak, as `torch.cuda.max_memory_allocated` shows them; without workspaces
            where those are unknown.
        process_bytes: with the context; None if that is unknown.
        state: "calibrated: ..." or "not calibrated".
    """

    allocated_bytes: int
    process_bytes: int | None
    state: str


def on_device(cost: Cost, device: Device = Device()) -> DeviceMemory:
    """The memory of one training step on a CUDA device, according to the model."""
    allocated = cost.peak_block_bytes + (device.workspace_bytes or 0)
    process = None if device.context_bytes is None else allocated + device.context_bytes
    return DeviceMemory(allocated, process, "not calibrated" if device.measured is None else f"calibrated: {device.measured}")
