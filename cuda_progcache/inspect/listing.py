# SPDX-License-Identifier: Apache-2.0
"""The instructions of a cubin, each with its source line and the number of live registers.

They are parsed from the output of ``nvdisasm`` (in the format of CUDA 13.5: labels, a column of live registers, and a
comment at each change of source line). Opcodes are sorted into the classes of the instruction set reference in NVIDIA's
"CUDA Binary Utilities"; memory instructions are classed by the memory space they access.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError
from cuda_progcache.inspect.elf import Cubin
from cuda_progcache.inspect.nvdisasm import disassemble

_SECTION = re.compile(r"^//-+ \.text\.(\S+)")
_LABEL = re.compile(r"^([.$\w]+):")
_SOURCE = re.compile(r'^\s*//## File "(.*)", line (\d+)(.*)$')
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*$")
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?(\w+)")
_LOCAL_LABEL = re.compile(r"\.L_x_\d+")
_NUMBERED = re.compile(r"\$__internal_\d+_\$")

#: The opcodes of each class. An opcode that begins with a U and isn't listed works on uniform registers.
_CLASSES = {
    "tensor": "HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA UTCCP UTCBAR "
    "UTCSHIFT UTCATOMSWS LDTM STTM LDT STT WARPGROUP WARPGROUPSET",
    "float": "FADD FADD2 FADD32I FCHK FFMA FFMA2 FFMA32I FMNMX FMNMX3 FMUL FMUL2 FMUL32I FSEL FSET FSETP FSWZADD",
    "half": "HADD2 HADD2_32I HFMA2 HFMA2_32I HMNMX2 HMUL2 HMUL2_32I HSET2 HSETP2 FHADD FHFMA",
    "double": "DADD DFMA DMUL DSETP",
    "special": "MUFU",
    "integer": "BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL IMUL32I ISCADD ISCADD32I ISETP LEA LOP "
    "LOP3 LOP32I POPC SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3",
    "conversion": "F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP",
    "uniform": "CS2UR VOTEU",
    "movement": "BMOV B2R CREDUX CS2R LEPC MATCH MOV MOV32I MOVM P2R PLOP3 PRMT PSETP R2B R2P R2UR REDUX S2R S2UR SEL "
    "SHFL VOTE",
    "global": "ATOMG CCTL LDG LDGDEPBAR LDGMC LDGSTS RED REDG STG UBLKCP UBLKPF UBLKRED UTMACCTL UTMACMDFLUSH UTMALDG "
    "UTMAPF UTMAREDG UTMASTG",
    "shared": "ATOMS LDS LDSM REDAS STAS STS STSM SYNCS",
    "local": "CCTLL LDL STL",
    "generic": "ATOM LD QSPC ST",
    "constant": "LDC LDCU UCCTL ULDC",
    "texture": "FOOTPRINT SUATOM SULD SUQUERY SURED SUST TEX TLD TLD4 TMML TXD TXQ",
    "barrier": "ACQBULK ARRIVES BAR CGAERRBAR DEPBAR ELECT ENDCOLLECTIVE ERRBAR FENCE MEMBAR NANOSLEEP PREEXIT "
    "UCGABAR_ARV UCGABAR_WAIT USETMAXREG WARPSYNC",
    "control": "BPT BRA BREAK BRX BRXU BSSY BSYNC CALL EXIT JMP JMX JMXU KILL NOP PMTRIG RET RPCMOV RTT YIELD",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}


class Source(NamedTuple):
    """A line of a source file; for a rendered kernel, of its template."""

    file: str
    line: int


class Instruction(NamedTuple):
    """An instruction.

    Attributes
    ----------
    offset : int
        Offset in bytes from the start of the kernel's code.
    labels : tuple of str
        The labels before the instruction: branch targets, and functions within the kernel's code.
    text : str
        The instruction as nvdisasm prints it.
    live : int or None
        The number of live registers (32 bits, per thread); None if nvdisasm doesn't print it.
    source : Source or None
        The line that it was compiled from; None without line information (``lineinfo=True``).
    """

    offset: int
    labels: tuple[str, ...]
    text: str
    live: int | None
    source: Source | None

    @property
    def opcode(self) -> str:
        """The operation without its modifiers: ``"IMAD"`` for ``@P0 IMAD.WIDE R2, …``."""
        found = _OPCODE.match(self.text)
        return found[1] if found else ""


def instructions(data: bytes) -> dict[str, tuple[Instruction, ...]]:
    """Return the instructions of each kernel of a cubin.

    nvdisasm is run once, or twice if the cubin has line information; a run takes some 350 ms. Functions that weren't
    inlined are part of the code of the kernel that calls them.

    Parameters
    ----------
    data : bytes
        The cubin.

    Returns
    -------
    dict
        Kernel name, as in the cubin, to its instructions in order, without the padding at the end.

    Raises
    ------
    InspectError
        If the data isn't a cubin, or nvdisasm isn't installed or rejects it.
    """
    cubin = Cubin(data)
    found = _parsed(disassemble(data, "--life-range-mode", "count"))
    kernels = {kernel.name for kernel in cubin.kernels()}
    if ".debug_line" in cubin.sections:
        with_source = _parsed(disassemble(data, "--print-code", "--print-line-info"))
        found = {
            name: tuple(one._replace(source=other.source) for one, other in zip(code, with_source[name], strict=True))
            for name, code in found.items()
        }
    missing = kernels - found.keys()
    if missing:
        raise InspectError(f"nvdisasm printed no code for {', '.join(sorted(missing))}; its format may have changed")
    return {name: code for name, code in found.items() if name in kernels}


def _parsed(listing: str) -> dict[str, tuple[Instruction, ...]]:
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] | None = None
    labels: list[str] = []
    source: Source | None = None
    for line in listing.splitlines():
        text, _, live = line.partition("// |")
        if section := _SECTION.match(line):
            code = found.setdefault(section[1], [])
            labels, source = [], None
        elif code is None:
            continue
        elif line.startswith("//--"):
            code = None
        elif at := _INSTRUCTION.match(text):
            code.append(Instruction(int(at[1], 16), tuple(labels), at[2], _count(live), source))
            labels = []
        elif label := _LABEL.match(text):
            labels.append(label[1])
        elif (place := _SOURCE.match(line)) and " inlined at " not in place[3]:
            source = Source(place[1], int(place[2]))
    return {name: _without_padding(code) for name, code in found.items()}


def _count(columns: str) -> int | None:
    first = columns.partition("|")[0].strip()
    return int(first) if first.isdigit() else None


def _without_padding(code: list[Instruction]) -> tuple[Instruction, ...]:
    end = len(code)
    while end and code[end - 1].text == "NOP" and not code[end - 1].labels:
        end -= 1
    return tuple(code[:end])


def mix(code: Iterable[Instruction]) -> dict[str, int]:
    """Count the instructions of each class.

    Returns
    -------
    dict
        The number of instructions by class, the most frequent first: ``"float"``, ``"half"``, ``"double"``,
        ``"special"`` (``MUFU``), ``"integer"``, ``"tensor"``, ``"conversion"``, ``"movement"``, ``"uniform"``,
        ``"global"``, ``"shared"``, ``"local"``, ``"generic"``, ``"constant"``, ``"texture"``, ``"barrier"``,
        ``"control"`` or ``"other"``. An instruction counts once, however often it runs.
    """
    return dict(Counter(_class(one.opcode) for one in code).most_common())


def _class(opcode: str) -> str:
    known = _CLASS_OF.get(opcode)
    return known or ("uniform" if opcode.startswith("U") else "other")


def live_peak(code: Iterable[Instruction]) -> int:
    """Return the largest number of registers that are live at once."""
    return max((one.live or 0 for one in code), default=0)


def normalised(code: Sequence[Instruction]) -> list[str]:
    """Return the instructions as lines for comparison: equal code gives equal lines.

    Labels are renumbered in the order of the code. Offsets are left out, and so are return addresses that are moved
    into registers before a call.
    """
    names: dict[str, str] = {}
    for one in code:
        for label in one.labels:
            if _LOCAL_LABEL.fullmatch(label):
                names.setdefault(label, f".L{len(names)}")
    texts = _without_addresses(code)

    def renamed(text: str) -> str:
        text = _LOCAL_LABEL.sub(lambda found: names.get(found[0], ".Lend"), text)
        return _NUMBERED.sub("$__internal_$", text)

    lines = []
    for one, text in zip(code, texts, strict=True):
        lines += [f"{renamed(label)}:" for label in one.labels if not label.startswith(".text.")]
        lines.append(f"    {renamed(text)}")
    return lines


def _without_addresses(code: Sequence[Instruction]) -> list[str]:
    """Return the instructions' texts, with ``(return)`` for the return address of a call that follows closely."""
    texts = [one.text for one in code]
    for number, one in enumerate(code):
        if one.opcode == "CALL" and number + 1 < len(code):
            address = re.compile(rf"\b0x{code[number + 1].offset:x}$")
            for before in range(max(number - 8, 0), number):
                if code[before].opcode in {"MOV", "IMAD", "HFMA2", "UMOV"}:
                    texts[before] = address.sub("(return)", texts[before])
    return texts
