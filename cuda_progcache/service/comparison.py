# SPDX-License-Identifier: Apache-2.0
"""What the programs in a cache use, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.inspect import BinaryDiff, Occupancy, Resources
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord

#: Threads of a block where neither the caller nor the kernel says.
_BLOCK_SIZE = 256


class KernelUse(NamedTuple):
    """What one kernel of a program uses.

    Attributes
    ----------
    entry : EntryInfo
        The program's.
    kernel : str
        The kernel's name as it was asked for (``gemv<float>``); as it stands in the cubin where nobody did.
    resources : Resources
    occupancy : Occupancy or None
        None: the architecture isn't known.
    """

    entry: EntryInfo
    kernel: str
    resources: Resources
    occupancy: Occupancy | None


def kernel_uses(
    entries: Iterable[EntryInfo],
    block_size: int | None = None,
    dynamic_shared_bytes: int = 0,
    on_error: Callable[[EntryInfo, Exception], object] | None = None,
) -> list[KernelUse]:
    """What the kernels of some programs use, and how many blocks of them run at once.

    Parameters
    ----------
    entries : iterable of EntryInfo
        Those that aren't cubins are passed over.
    block_size : int, optional
        Threads of a block. None: the largest that the kernel declares (``__launch_bounds__``), else 256.
    dynamic_shared_bytes : int
        Shared memory of a block beside the static one.
    on_error : callable, optional
        Called with an entry and the error for each that can't be read; None: they are passed over.
    """
    from cuda_progcache.inspect import Cubin, occupancy, resource_usage

    found = []
    for entry in entries:
        about = entry.about
        if (about.target_type or "cubin") != "cubin" or entry.path is None:
            continue
        try:
            data = entry.path.read_bytes()
            arch, used = Cubin(data).arch, resource_usage(data)
        except (InspectError, OSError) as error:
            if on_error is not None:
                on_error(entry, error)
            continue
        names = about.expressions
        for symbol, resources in used.items():
            threads = block_size or resources.max_threads or _BLOCK_SIZE
            try:
                runs = occupancy(resources, arch, threads, dynamic_shared_bytes)
            except InspectError:
                runs = None
            found.append(KernelUse(entry, names.get(symbol, symbol), resources, runs))
    return found


class ProgramDiff(NamedTuple):
    """What differs between two programs.

    Attributes
    ----------
    key : tuple of str
        A sentence per difference of what they were compiled from; empty where nothing is known of one of them.
    binary : BinaryDiff
        What differs between their binaries.
    """

    key: tuple[str, ...]
    binary: BinaryDiff


def compare(
    before: tuple[bytes, CompileRecord | None], after: tuple[bytes, CompileRecord | None], context: int = 3
) -> ProgramDiff:
    """What differs between two programs.

    Parameters
    ----------
    before, after : tuple
        The binary, and what is recorded of its compile; None: nothing is, as of a file.
    context : int
        Equal lines around each difference of the machine code.

    Raises
    ------
    InspectError
        If a cubin is damaged, or nvdisasm isn't installed or refuses it.
    """
    from cuda_progcache.compile.history import differences
    from cuda_progcache.inspect import diff

    known = [about for _, about in (before, after) if about is not None and about.is_compile]
    reasons = tuple(differences(known[1], known[0])) if len(known) == 2 else ()
    return ProgramDiff(reasons, diff(before[0], after[0], context))


def binary_of(entry: EntryInfo) -> bytes:
    """The bytes of an entry.

    Raises
    ------
    InspectError
        If they can't be read.
    """
    try:
        return Path(str(entry.path)).read_bytes()
    except OSError as error:
        raise InspectError(f"{entry.digest[:12]} can't be read: {error}") from error
