# SPDX-License-Identifier: Apache-2.0
"""Disassembly of cubins with nvdisasm, and the search for the CUDA toolkit's tools.

The tools are in the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
(``pip install 'cuda-progcache[inspect]'``), or with a CUDA toolkit on PATH.
"""

from __future__ import annotations

import functools
import os
import subprocess

from cuda_progcache._util.scratch import ScratchFolder
from cuda_progcache.errors import InspectError
from cuda_progcache.inspect.elf import check_cubin


@functools.cache
def find_tool(name: str) -> str:
    """Return the path of ``cuobjdump`` or ``nvdisasm``, searched for with ``cuda.pathfinder``, then on PATH.

    Raises
    ------
    InspectError
        If the tool isn't found; the message names the wheel to install.
    """
    import shutil

    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility(name) or shutil.which(name)
    if path is None:
        raise InspectError(
            f"{name} was not found in the wheels, CONDA_PREFIX, CUDA_HOME or PATH: install it with "
            f"`pip install nvidia-cuda-{name}` (or `pip install 'cuda-progcache[inspect]'`)"
        )
    return path


def disassemble(data: bytes, *options: str) -> str:
    """Run ``nvdisasm`` on a cubin and return its output (some 350 ms).

    Parameters
    ----------
    data : bytes
        The cubin.
    *options : str
        Command-line options of ``nvdisasm``.

    Raises
    ------
    InspectError
        If the data isn't a cubin (the message says what it is), or the tool isn't installed or rejects it.
    """
    check_cubin(data)
    tool = find_tool("nvdisasm")
    with ScratchFolder("progcache-inspect-") as folder:
        file = os.path.join(folder, "program.cubin")
        with open(file, "wb") as binary:
            binary.write(data)
        done = subprocess.run([tool, *options, file], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise InspectError(f"nvdisasm failed with status {done.returncode}: {said}")
    return done.stdout


def sass(data: bytes) -> str:
    """Return the disassembly of a cubin: ``nvdisasm --print-code``.

    Raises
    ------
    InspectError
        In the same cases as :func:`disassemble`.
    """
    return disassemble(data, "--print-code")
