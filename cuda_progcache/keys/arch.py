# SPDX-License-Identifier: Apache-2.0
"""Architectures as compilers write them, and which device runs what was made for one."""

from __future__ import annotations

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import ArchError

#: Integrated GPUs: binary compatibility between them and discrete ones isn't given (CUDA C++ Programming Guide,
#: "Binary Compatibility").
_INTEGRATED = {53, 62, 72, 87, 101, 110}


class Arch(NamedTuple):
    """An architecture: ``sm_90``, ``sm_90a``, ``compute_100f``.

    Attributes
    ----------
    kind : {"sm", "compute", "lto"}
        Of machine code, of virtual instructions (PTX), of LTO-IR.
    capability : int
        The compute capability: 90 for 9.0.
    feature : {"", "a", "f"}
        ``a``: for this device alone; ``f``: for its family.
    """

    kind: str
    capability: int
    feature: str = ""

    @classmethod
    def parse(cls, text: object) -> Arch:
        """Read an architecture; white space around it doesn't count.

        Raises
        ------
        ArchError
            It isn't written like one.
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
        """Whether a program for this architecture runs on a device, compiled further where it isn't machine code yet.

        Parameters
        ----------
        target_type : {"cubin", "ptx", "ltoir"}
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
