"""The CUDA device through CuPy: streams, events, memory, copies and kernel launches, as ``cuda_runtime`` describes them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable

from cupy.cuda import driver, runtime

from kvtier.copy.cuda_batch import BatchCopy, BatchCopyError
from kvtier.copy.cuda_kernels import MODULE_OF_KERNEL, compile_module
from kvtier.copy.cuda_runs import Addresses, Ints
from kvtier.copy.cuda_runtime import DeviceEvent, Launch

_LOG = logging.getLogger(__name__)

_STREAM_NON_BLOCKING = 1
_URGENT = -5  # the device takes the nearest priority that it has
_EVENT_DISABLE_TIMING = 2
_REGISTER_PORTABLE_AND_MAPPED = 3
_COPY_DEFAULT = 4  # addresses say where memory is
_OK, _NOT_READY = 0, 600
_MAJOR, _MINOR, _HOST_POINTERS = 75, 76, 91  # attributes of a device
_MAX_DYNAMIC_SHARED_BYTES = 8  # attribute of a function
_SHARED_BYTES_FOR_ALL = 48 << 10


def device_names() -> list[str]:
    """Name, capability and memory of every device. Raises RuntimeError where there is no device or no driver."""
    found = []
    for number in range(runtime.getDeviceCount()):
        about = runtime.getDeviceProperties(number)
        found.append(f"{about['name'].decode()}, sm_{about['major']}{about['minor']}, {about['totalGlobalMem'] / (1 << 30):.0f}GiB")
    return found


class CupyEvent:
    """A CUDA event of its own."""

    def __init__(self, stream: int) -> None:
        self.handle: int = runtime.eventCreateWithFlags(_EVENT_DISABLE_TIMING)
        runtime.eventRecord(self.handle, stream)

    def done(self) -> bool:
        """Whether the work up to it is over; never waits. Raises RuntimeError for what the device reports."""
        status: int = runtime.eventQuery(self.handle)
        if status not in (_OK, _NOT_READY):
            raise RuntimeError(f"a copy failed: CUDA error {status}")
        return status == _OK

    def wait(self) -> None:
        """Waits until the work up to it is over."""
        runtime.eventSynchronize(self.handle)

    def __del__(self) -> None:
        # nobody can be told, and at the interpreter's end the context may be gone
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            runtime.eventDestroy(self.handle)


class CupyMemory:
    """Memory that is given back once."""

    def __init__(self, address: int, give_back: Callable[[int], None]) -> None:
        self.address = address
        self._give_back: Callable[[int], None] | None = give_back

    def close(self) -> None:
        """Gives it back. Idempotent."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.address)


class CupyRuntime:
    """A :class:`~kvtier.copy.cuda_runtime.CudaRuntime`. Shares the device's context with torch.

    Args:
        device: the device's number in this process

    Raises:
        RuntimeError: there is no such device, or no driver.
    """

    def __init__(self, device: int) -> None:
        runtime.setDevice(device)
        runtime.free(0)  # makes the context, which a driver call needs
        self.device = device
        self.capability: int = 10 * runtime.deviceGetAttribute(_MAJOR, device) + runtime.deviceGetAttribute(_MINOR, device)
        self.reads_host_memory = runtime.deviceGetAttribute(_HOST_POINTERS, device) == 1
        self._functions: dict[str, int] = {}
        self._shared_bytes: dict[str, int] = {}
        self._batch: BatchCopy | None = BatchCopy.find()

    def open_stream(self, *, is_urgent: bool) -> int:
        handle: int = runtime.streamCreateWithPriority(_STREAM_NON_BLOCKING, _URGENT if is_urgent else 0)
        return handle

    def close_stream(self, stream: int) -> None:
        runtime.streamDestroy(stream)

    def allocate(self, num_bytes: int) -> CupyMemory:
        try:
            return CupyMemory(runtime.malloc(num_bytes), runtime.free)
        except runtime.CUDARuntimeError as error:
            free_bytes, total_bytes = runtime.memGetInfo()
            raise MemoryError(f"{free_bytes} of {total_bytes} bytes are free on the device ({error})") from error

    def register(self, address: int, num_bytes: int) -> CupyMemory:
        runtime.hostRegister(address, num_bytes, _REGISTER_PORTABLE_AND_MAPPED)
        return CupyMemory(address, runtime.hostUnregister)

    def record(self, stream: int) -> CupyEvent:
        return CupyEvent(stream)

    def wait(self, stream: int, event: DeviceEvent) -> None:
        assert isinstance(event, CupyEvent)
        runtime.streamWaitEvent(stream, event.handle)

    def copy(self, stream: int, to: Addresses, source: Addresses, num_bytes: Ints) -> None:
        if self._batch is not None and len(num_bytes) > 1:
            try:
                self._batch(stream, to, source, num_bytes)
                return
            except BatchCopyError as error:
                # copying the same bytes once more does no harm
                _LOG.warning("kvtier: %s; copies go one by one", error)
                self._batch = None
        for target, origin, length in zip(to.tolist(), source.tolist(), num_bytes.tolist(), strict=True):
            runtime.memcpyAsync(target, origin, length, _COPY_DEFAULT, stream)

    def launch(self, stream: int, launch: Launch) -> None:
        function = self._function(launch.kernel)
        if launch.shared_bytes > max(_SHARED_BYTES_FOR_ALL, self._shared_bytes.get(launch.kernel, 0)):
            driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, launch.shared_bytes)
            self._shared_bytes[launch.kernel] = launch.shared_bytes
        arguments = (ctypes.c_void_p * 1)(launch.params.ctypes.data)
        place = ctypes.addressof(arguments)
        driver.launchKernel(function, launch.num_blocks, 1, 1, launch.num_threads, 1, 1, launch.shared_bytes, stream, place, 0)

    @property
    def has_batch_copies(self) -> bool:
        """Whether the driver takes a batch of copies in one call."""
        return self._batch is not None

    def _function(self, kernel: str) -> int:
        if kernel not in self._functions:
            name = MODULE_OF_KERNEL[kernel]
            module = driver.moduleLoadData(compile_module(name, self.capability).code)
            for each in (each for each, owner in MODULE_OF_KERNEL.items() if owner == name):
                self._functions[each] = driver.moduleGetFunction(module, each)
        return self._functions[kernel]
