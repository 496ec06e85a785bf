"""The contract of CUDA devices, on the simulated one: so the tests of the GPU lane themselves are known to run, and to fail."""

from __future__ import annotations

import unittest

import pytest

from kvtier.copy.cuda_choice import Way
from kvtier.copy.cuda_runtime import Launch
from kvtier.testing.cuda_copies import CudaContract, WayContract
from kvtier.testing.simulated_cuda import SimulatedCuda
from tests.cuda_on_cpu import KernelsOnCpu


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    TestSimulatedCuda.kernels = KernelsOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"))


class TestSimulatedCuda(CudaContract):
    """The copies' kernels by their twin in numpy, those of rows by their own text."""

    rounds = 2
    kernels: KernelsOnCpu

    def open_runtime(self) -> SimulatedCuda:
        def play(launch: Launch) -> None:
            self.kernels.place_rows(launch.kernel, launch.params)

        return SimulatedCuda(kernels=play)


class TestContractCanFail:
    """A device that is a little wrong does not pass."""

    def test_a_byte_too_many(self) -> None:
        """A kernel that writes into the guard band, or past the end of a piece, is caught."""

        class Sloppy(SimulatedCuda):
            def copy(self, stream, to, source, num_bytes):  # type: ignore[no-untyped-def]
                super().copy(stream, to, source, num_bytes + (len(num_bytes) > 1))

        class Contract(CudaContract):
            def open_runtime(self) -> SimulatedCuda:
                return Sloppy()

        with pytest.raises(AssertionError, match="wrong bytes on the"):
            Contract().test_every_way_moves_every_byte_of_every_layout()

    @pytest.mark.parametrize("test", ["test_copies_are_ordered_with_the_engines_stream", "test_layers_are_stored_as_they_are_computed"])
    def test_copies_that_do_not_wait_for_the_engine(self, test: str) -> None:
        """Are caught by the bytes alone, as on a device that checks no order."""

        class Hasty(SimulatedCuda):
            def wait(self, stream, event):  # type: ignore[no-untyped-def]
                pass

            def _check(self, operation):  # type: ignore[no-untyped-def]
                pass

        class Contract(WayContract):
            def open_runtime(self) -> SimulatedCuda:
                return Hasty()

        with pytest.raises(AssertionError, match=r"wrong bytes on the|too old bytes"):
            getattr(Contract(), test)()

    @pytest.mark.parametrize("test", ["test_copies_are_ordered_with_the_engines_stream", "test_layers_are_stored_as_they_are_computed"])
    def test_a_device_that_is_idle_when_a_copy_is_submitted(self, test: str) -> None:
        """Shows nothing of the order, so it does not pass: a copy that waits for nobody would be right there."""

        class Idle(SimulatedCuda):
            def copy(self, stream, to, source, num_bytes):  # type: ignore[no-untyped-def]
                super().copy(stream, to, source, num_bytes)
                self.finish()

        class Contract(WayContract):
            def open_runtime(self) -> SimulatedCuda:
                return Idle()

        with pytest.raises(AssertionError, match="nothing was shown"):
            getattr(Contract(), test)()

    def test_a_way_that_the_device_lacks(self) -> None:
        """Is not a success: the test says that nothing was checked."""

        class Contract(WayContract):
            ways = (Way.BULK,)

            def open_runtime(self) -> SimulatedCuda:
                return SimulatedCuda(capability=80)

        with pytest.raises(unittest.SkipTest, match="NOTHING WAS CHECKED: the device allows none of \\['bulk'\\]"):
            Contract().test_every_way_moves_every_byte_of_every_layout()
