"""What can go wrong with a GPU, one class per cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from surogate_formats.errors import SurogateError


class CudaError(SurogateError):
    """Base of what goes wrong with a GPU."""


class NoCudaError(CudaError):
    """CuPy is missing, or there is no GPU that can run the kernels."""


class DeviceMemoryError(CudaError):
    """The GPU's memory is taken."""


class DeviceFailedError(CudaError):
    """The GPU or its driver reports an error in the middle of a run."""


@contextmanager
def device_errors(name: str) -> Iterator[None]:
    """Puts what CuPy raises into a line; `name` is the device's.

    Raises:
        DeviceMemoryError, DeviceFailedError: see the classes.
    """
    from cupy.cuda import driver, memory, runtime

    try:
        yield
    except memory.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{name}: no memory left ({first_line(error)}); end what else runs there, or use `device='cpu'`"
        ) from error
    except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
        raise DeviceFailedError(f"{name}: {first_line(error)}; try again, or use `device='cpu'`") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0].rstrip(".")
