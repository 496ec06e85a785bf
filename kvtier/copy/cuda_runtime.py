"""What the copies ask of a CUDA device: the one interface behind which everything that touches CUDA lies.

``cuda_cupy`` has the real one; ``kvtier.testing`` has one that runs late, out of order, and notices what was not waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvtier.copy.cuda_params import Record
from kvtier.copy.cuda_runs import Addresses, Ints


class DeviceEvent(Protocol):
    """A point in the work of a stream."""

    def done(self) -> bool:
        """Whether the work up to it is over; never waits. Raises what the device reports."""

    def wait(self) -> None:
        """Keeps the caller waiting until the work up to it is over. Raises what the device reports."""


class DeviceMemory(Protocol):
    """Device memory that was allocated, or host memory that was made known to the device."""

    address: int

    def close(self) -> None:
        """Gives it back; the device must not use it any more. Idempotent."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    params: Record
    """the kernel's parameter struct; copied when it is launched"""
    num_blocks: int
    num_threads: int
    shared_bytes: int = 0


class CudaRuntime(Protocol):
    """One device, as one thread uses it. Streams are the integers that CUDA's interface calls handles.

    Work on one stream is done in order; work on different streams only as ``record`` and ``wait`` say. All methods but
    ``DeviceEvent.wait`` return at once. Methods raise RuntimeError where the device reports an error.
    """

    capability: int
    """10 * major + minor"""
    reads_host_memory: bool
    """kernels may use the addresses of registered host memory"""

    def open_stream(self, *, is_urgent: bool) -> int:
        """A stream of its own. The device prefers the kernels of urgent ones."""

    def close_stream(self, stream: int) -> None:
        """Ends a stream; what was submitted to it goes on. A device has few queues, which streams share where there are many."""

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """Device memory, not cleared. Raises MemoryError, which names how much there is, where it does not fit."""

    def register(self, address: int, num_bytes: int) -> DeviceMemory:
        """Pins host memory, so that copies are direct and asynchronous."""

    def record(self, stream: int) -> DeviceEvent:
        """The end of what was submitted to ``stream`` so far."""

    def wait(self, stream: int, event: DeviceEvent) -> None:
        """What is submitted to ``stream`` from now on starts after ``event``."""

    def copy(self, stream: int, to: Addresses, source: Addresses, num_bytes: Ints) -> None:
        """Copies runs of bytes, in any order among each other. The arrays may change once this has returned."""

    def launch(self, stream: int, launch: Launch) -> None:
        """Starts a kernel."""
