# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the GPU tests: a device, and launches of library kernels on it. Without a device, tests are skipped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
KERNEL_TESTS = HERE.parent / "kernels"
if str(KERNEL_TESTS) not in sys.path:  # for the checks shared with the emulated runs
    sys.path.insert(0, str(KERNEL_TESTS))


def _no_device() -> str | None:
    """Return why there is no CUDA device, or None if there is one. Other failures to initialize CUDA are errors."""
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # cuda.bindings raises this if libcuda isn't installed
        return f"no CUDA driver: {error}"
    if status in (driver.CUresult.CUDA_ERROR_NO_DEVICE, driver.CUresult.CUDA_ERROR_STUB_LIBRARY):
        return f"no CUDA device: {status.name}"
    assert status == driver.CUresult.CUDA_SUCCESS, f"cuInit failed: {status!r}"
    return None


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The first CUDA device, made current."""
    if (reason := _no_device()) is not None:
        pytest.skip(reason)
    from cuda.core import Device

    device = Device(0)
    device.set_current()
    return device


class GpuLauncher:
    """A launcher that compiles library kernels for the device through the cache; see `launchers.Launcher`."""

    def __init__(self, device: Any, service: Any) -> None:
        capability = device.compute_capability
        self.arch = f"sm_{capability.major}{capability.minor}"
        self.device = device
        self.service = service
        self.stream = device.create_stream()

    def spec(self, kernel: str) -> Any:
        return self.service.library[kernel]

    def __call__(
        self,
        kernel: str,
        args: Sequence[Any],
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        entry: int | str = 0,
        **params: Any,
    ) -> None:
        from cuda.core import LaunchConfig, launch

        if "block" in self.spec(kernel).parameters:
            params["block"] = block
        rendered = self.service.library.render(kernel, **params)
        names = tuple(rendered.name_expressions) or tuple(rendered.entry_points)
        program = self.service.kernel(kernel, arch=self.arch, **params)
        name = names[entry] if isinstance(entry, int) else entry
        function = program.to_object_code().get_kernel(name)
        shared_bytes = self.service.library.launches(kernel, **params)[name].shared_bytes
        if shared_bytes > 48 * 1024:
            _allow_shared_memory(function, shared_bytes)
        config = LaunchConfig(grid=_sizes(grid), block=_sizes(block), shmem_size=shared_bytes)
        copies = [_DeviceCopy(a) if isinstance(a, np.ndarray) or hasattr(a, "array") else None for a in args]
        try:
            values = [copy.pointer if copy else _scalar(a) for a, copy in zip(args, copies, strict=True)]
            launch(self.stream, config, function, *values)
            self.stream.sync()
            for copy in copies:
                if copy:
                    copy.read_back()
        finally:
            for copy in copies:
                if copy:
                    copy.free()


def _sizes(size: int | Sequence[int]) -> int | tuple[int, ...]:
    return size if isinstance(size, int) else tuple(size)


def _scalar(value: Any) -> Any:
    """Convert a kernel parameter for cuda.core: None is a null pointer, a Python int is 64 bits wide."""
    if value is None:
        return 0
    return bool(value) if isinstance(value, np.bool_) else value


def _allow_shared_memory(function: Any, shared_bytes: int) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = driver.CUkernel(int(function.handle))
    _check(driver.cuKernelSetAttribute(attribute, shared_bytes, handle, driver.CUdevice(0)))


def _check(result: Any) -> Any:
    from cuda.bindings import driver

    status, *values = result
    assert status == driver.CUresult.CUDA_SUCCESS, repr(status)
    return values[0] if values else None


class _DeviceCopy:
    """An array argument in device memory, between guard bytes that the kernel must leave alone.

    The guards are 0xff (NaN for floating types), so that a read beyond the array shows in the result.
    """

    GUARD = 512

    def __init__(self, argument: Any) -> None:
        from cuda.bindings import driver

        self.array: np.ndarray = argument if isinstance(argument, np.ndarray) else argument.array
        offset = 0 if isinstance(argument, np.ndarray) else argument.offset * self.array.itemsize
        self.before = self.GUARD + offset
        self.image = np.full(self.before + self.array.nbytes + self.GUARD, 0xFF, np.uint8)
        self.image[self.before : self.before + self.array.nbytes] = np.frombuffer(self.array.tobytes(), np.uint8)
        self.base = _check(driver.cuMemAlloc(self.image.nbytes))
        _check(driver.cuMemcpyHtoD(self.base, self.image, self.image.nbytes))
        self.pointer = int(self.base) + self.before

    def read_back(self) -> None:
        from cuda.bindings import driver

        after = np.empty_like(self.image)
        _check(driver.cuMemcpyDtoH(after, self.base, after.nbytes))
        end = self.before + self.array.nbytes
        assert (after[: self.before] == 0xFF).all() and (after[end:] == 0xFF).all(), (
            "the kernel wrote outside an argument's array"
        )
        data = (
            after[self.before : end].view(self.array.dtype) if self.array.nbytes else after[:0].view(self.array.dtype)
        )
        if self.array.flags.writeable:
            self.array[...] = data.reshape(self.array.shape)
        else:
            assert data.tobytes() == self.array.tobytes(), "the kernel wrote to a read-only argument"

    def free(self) -> None:
        from cuda.bindings import driver

        _check(driver.cuMemFree(self.base))


@pytest.fixture(scope="session")
def gpu_service(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A compile service over this checkout's kernels, with its own cache."""
    from cuda_progcache import CompileService
    from cuda_progcache.service.manifest import KernelLibrary

    return CompileService(tmp_path_factory.mktemp("gpu-cache"), library=KernelLibrary(HERE.parents[1] / "kernels"))


@pytest.fixture(scope="session")
def run_kernel(gpu: Any, gpu_service: Any) -> GpuLauncher:
    """``run_kernel(name, args, grid=, block=, entry=, **params)`` launches a kernel; see `launchers.Launcher`."""
    return GpuLauncher(gpu, gpu_service)
