# SPDX-License-Identifier: Apache-2.0
"""Architectures as compilers spell them, and which devices run a program for an architecture."""

from __future__ import annotations

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import ArchError

#: Integrated GPUs. Binary compatibility between integrated and discrete GPUs isn't guaranteed (CUDA C++ Programming
#: Guide, "Binary Compatibility").
_INTEGRATED = {53, 62, 72, 87, 101, 110}


class Arch(NamedTuple):
    """An architecture, such as ``sm_90``, ``sm_90a`` or ``compute_100f``.

    Attributes
    ----------
    kind : {"sm", "compute", "lto"}
        ``"sm"`` for machine code, ``"compute"`` for virtual instructions (PTX), ``"lto"`` for LTO-IR.
    capability : int
        The compute capability: 90 for 9.0.
    feature : {"", "a", "f"}
        ``"a"`` for this compute capability only, ``"f"`` for its family.
    """

    kind: str
    capability: int
    feature: str = ""

    @classmethod
    def parse(cls, text: object) -> Arch:
        """Parse an architecture, ignoring white space around it.

        Raises
        ------
        ArchError
            The text isn't an architecture.
        """
        kind, _, number = text.strip().partition("_") if isinstance(text, str) else ("", "", "")
        feature = number[-1:] if number[-1:] in {"a", "f"} else ""
        digits = number.removesuffix(feature)
        if kind not in {"sm", "compute", "lto"} or not (digits.isascii() and digits.isdigit()):
            raise ArchError(f"{text!r} is not an architecture such as sm_90, sm_90a or compute_90")
        return cls(kind, int(digits), feature)

    def __str__(self) -> str:
        return f"{self.kind}_{self.capability}{self.feature}"

    @property
    def major(self) -> int:
        """The compute capability's major number: 9 for sm_90."""
        return self.capability // 10

    def runs_on(self, target_type: str, device: Arch) -> bool:
        """Return whether a program for this architecture runs on a device; PTX and LTO-IR are compiled further first.

        Parameters
        ----------
        target_type : {"cubin", "ptx", "ltoir"}
            The type of the program.
        device : Arch
        """
        made, here = self.capability, device.capability
        if self.feature == "a":
            return made == here
        same_major_and_later = self.major == device.major and made <= here
        if self.feature == "f":
            return same_major_and_later
        if target_type in {"ptx", "ltoir"}:
            return made <= here
        return made == here or (same_major_and_later and not {made, here} & _INTEGRATED)
