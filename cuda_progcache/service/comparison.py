# SPDX-License-Identifier: Apache-2.0
"""The resources that programs in a cache use, and the differences between two programs."""

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

#: Threads per block if neither the caller nor the kernel gives a number.
_BLOCK_SIZE = 256


class KernelUse(NamedTuple):
    """The resources that one kernel of a program uses.

    Attributes
    ----------
    entry : EntryInfo
        The program's entry.
    kernel : str
        The kernel's name expression (``gemv<float>``), or its symbol in the cubin if it has none.
    resources : Resources
    occupancy : Occupancy or None
        None if it can't be computed, as for an unknown architecture.
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
    """Return the resources that the kernels of some programs use, and their occupancy.

    Parameters
    ----------
    entries : iterable of EntryInfo
        Entries that aren't cubins are skipped.
    block_size : int, optional
        Threads per block. None: the largest block that the kernel declares (``__launch_bounds__``), otherwise 256.
    dynamic_shared_bytes : int
        Dynamic shared memory per block, in addition to the static shared memory.
    on_error : callable, optional
        Called with the entry and the error for each entry that can't be read. None: such entries are skipped.

    Returns
    -------
    list of KernelUse
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
    """The differences between two programs.

    Attributes
    ----------
    key : tuple of str
        A sentence per difference between their compile inputs; empty if either program has no compile record.
    binary : BinaryDiff
        The differences between their binaries.
    """

    key: tuple[str, ...]
    binary: BinaryDiff


def compare(
    before: tuple[bytes, CompileRecord | None], after: tuple[bytes, CompileRecord | None], context: int = 3
) -> ProgramDiff:
    """Return the differences between two programs.

    Parameters
    ----------
    before, after : tuple
        The binary and its compile record; None if there is no record, as for a file.
    context : int
        Number of equal lines shown around each difference in the machine code.

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
    """Return the bytes of an entry.

    Raises
    ------
    InspectError
        If they can't be read.
    """
    try:
        return Path(str(entry.path)).read_bytes()
    except OSError as error:
        raise InspectError(f"can't read entry {entry.digest[:12]}: {error}") from error
