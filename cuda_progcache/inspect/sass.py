# SPDX-License-Identifier: Apache-2.0
"""What is inside a binary: nvdisasm's disassembly; where the tools of the CUDA toolkit are.

The tools come with the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
(``pip install 'cuda-progcache[inspect]'``), or with a CUDA toolkit on PATH.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile

from cuda_progcache.errors import InspectError


@functools.cache
def find_tool(name: str) -> str:
    """Path of ``cuobjdump`` or ``nvdisasm``, found as ``cuda.pathfinder`` finds it, then on PATH.

    Raises
    ------
    InspectError
        If it is nowhere; the message names the wheel.
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


def _run(tool: str, arguments: list[str], data: bytes, target_type: str) -> str:
    if target_type != "cubin":
        raise InspectError(f"{tool} reads cubins; this is {target_type}" + _INSTEAD.get(target_type, ""))
    path = find_tool(tool)
    with tempfile.TemporaryDirectory(prefix="progcache-inspect-") as folder:
        file = os.path.join(folder, "program.cubin")
        with open(file, "wb") as binary:
            binary.write(data)
        done = subprocess.run([path, *arguments, file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InspectError(f"{tool} failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_INSTEAD = {"ptx": " (text: print it)", "ltoir": " (neither tool takes LTO-IR: link it to a cubin first)"}


def sass(data: bytes, target_type: str) -> str:
    """Disassembly of a cubin, as nvdisasm prints it.

    Raises
    ------
    InspectError
        If the tool isn't installed, refuses the file, or this isn't a cubin.
    """
    return _run("nvdisasm", ["--print-code"], data, target_type)
