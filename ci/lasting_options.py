# SPDX-License-Identifier: Apache-2.0
"""Find the options that affect later compiles in the same compiler process ("lasting" options).

    python -m ci.lasting_options                                          the toolchain of this environment
    python -m ci.lasting_options --nvrtc libnvrtc.so.12 --nvjitlink ... --nvvm ...

For each of some fifty sets of options, a new process compiles kernels with the options, for several architectures and
targets, and then every probe without them. If the outcome of a probe differs from that in a process of its own, the
options last. For lasting options, the script also checks whether a process that is only ever given these options does
its later compiles correctly. The findings go into ``cuda_progcache/keys/lasting.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ci.fresh_compiler import IR_KERNELS, KERNELS, Job, Toolchain, outcome, run, run_each
from cuda_progcache.keys.lasting import lasting

#: The sets of options to examine.
NVRTC = [
    ["--restrict"],
    ["--optimization-info=inline"],
    ["--device-debug"],
    ["--device-debug", "--dopt=on"],
    ["--generate-line-info"],
    ["--dopt=on"],
    ["--Ofast-compile=0"],
    ["--Ofast-compile=min"],
    ["--Ofast-compile=mid"],
    ["--Ofast-compile=max"],
    ["--relocatable-device-code=true"],
    ["--extensible-whole-program"],
    ["--ptxas-options=-v"],
    ["--ptxas-options=-O0"],
    ["--ptxas-options=-O1"],
    ["--ptxas-options=--warn-on-spills"],
    ["--ptxas-options=--device-debug"],
    ["--ptxas-options=--def-load-cache=cg"],
    ["--maxrregcount=32"],
    ["--ftz=true"],
    ["--prec-sqrt=false"],
    ["--prec-div=false"],
    ["--fmad=false"],
    ["--use_fast_math"],
    ["--extra-device-vectorization"],
    ["--dlink-time-opt"],
    ["--dlink-time-opt", "--gen-opt-lto"],
    ["--define-macro=k=renamed"],
    ["--undefine-macro=__CUDACC__"],
    ["--no-source-include"],
    ["--std=c++14"],
    ["--std=c++20"],
    ["--builtin-move-forward=false"],
    ["--builtin-initializer-list=false"],
    ["--disable-warnings"],
    ["--device-as-default-execution-space"],
    ["--device-int128"],
    ["--device-float128"],
    ["--no-display-error-number"],
    ["--diag-error=177"],
    ["--diag-suppress=177"],
    ["--diag-warn=177"],
    ["--brief-diagnostics=true"],
    ["--split-compile=2"],
    ["--fdevice-syntax-only"],
    ["--minimal"],
    ["--no-cache"],
    ["--frandom-seed=other"],
    ["--pch-verbose=false"],
    ["--pch-messages=false"],
    ["--instantiate-templates-in-pch=true"],
    ["--numba-debug"],
    ["--enable-tile"],
    ["-Xcudafe", "--trace_includes"],
    ["--Wreorder"],
    ["--Werror=all-warnings"],
]
NVJITLINK = [
    ["-g"],
    ["-O0"],
    ["-O1"],
    ["-O2"],
    ["-O3"],
    ["-lineinfo"],
    ["-g", "-O0"],
    ["-maxrregcount=32"],
    ["-time"],
    ["-verbose"],
    ["-ftz=1"],
    ["-prec-div=0"],
    ["-prec-sqrt=0"],
    ["-fma=0"],
    ["-kernels-used=k"],
    ["-variables-used=v"],
    ["-optimize-unused-variables"],
    ["-Xptxas=-O0"],
    ["-Xptxas=-v"],
    ["-Xptxas=--def-load-cache=cg"],
    ["-split-compile=2"],
    ["-split-compile-extended=2"],
    ["-no-cache"],
]
NVVM = [["-g"], ["-opt=0"], ["-opt=3"], ["-ftz=1"], ["-prec-sqrt=0"], ["-prec-div=0"], ["-fma=0"], ["-numba-debug"]]
NVVM += [["-gen-lto"], ["-g", "-opt=0"], ["-generate-line-info"]]


@dataclass(frozen=True)
class Finding:
    """The outcome for one set of options.

    ``verdict`` is ``"lasts"``, ``"forgotten"``, ``"refused"`` (this build doesn't support the options) or
    ``"crashed"``. ``seen`` lists the probes that the options affect. ``serves`` tells whether a process that is given
    only these options does its later jobs correctly. ``expected`` is the verdict of the table in the package.
    """

    library: str
    flags: tuple[str, ...]
    verdict: str
    seen: tuple[str, ...]
    serves: bool | None
    expected: str


def scan(
    library: str,
    sets: Iterable[Sequence[str]],
    probes: Mapping[str, Callable[..., Job]],
    compiles: Sequence[Callable[..., Job]],
) -> list[Finding]:
    """Examine each set of options of one library.

    Parameters
    ----------
    library : str
        The library's name in the table.
    sets : iterable of sequences of str
        Sets of flags.
    probes : mapping of str to callable
        Functions that make a job, given additional flags.
    compiles : sequence of callable
        Functions that make the jobs to run with the options before the probes.
    """
    plain = [probe() for probe in probes.values()]
    truth = [outcome(answers[0]) for answers in run_each([[job] for job in plain])]
    sequences = [[*(make(*flags) for make in compiles), *plain] for flags in sets]
    found = []
    for flags, answers in zip(sets, run_each([plain, *sequences])[1:], strict=True):
        given, after = answers[: len(compiles)], [outcome(answer) for answer in answers[len(compiles) :]]
        seen = tuple(name for name, now, then in zip(probes, after, truth, strict=False) if now != then)
        if len(after) < len(plain):
            verdict = "crashed"
        elif seen:
            verdict = "lasts"
        else:
            verdict = "forgotten" if any("made" in answer for answer in given) else "refused"
        serves = _serves_its_own(flags, probes) if verdict == "lasts" else None
        expected = "lasts" if lasting(library, flags) else "forgotten"
        found.append(Finding(library, tuple(flags), verdict, seen, serves, expected))
    return found


def _serves_its_own(flags: Sequence[str], probes: Mapping[str, Callable[..., Job]]) -> bool:
    jobs = [probe(*flags) for probe in probes.values()]
    alone = [outcome(answers[0]) for answers in run_each([[job] for job in jobs])]
    return [outcome(answer) for answer in run(jobs)] == alone


def scan_toolchain(tools: Toolchain, *, few: bool = False) -> list[Finding]:
    """Scan all libraries of a toolchain; ``few`` scans only the lasting options of the table, and some others."""
    known = {f"sm_{number}" for number in tools.archs}
    archs = [arch for arch in ("sm_80", "sm_90", "sm_120") if arch in known][-2 if few else 0 :]

    def some(library: str, sets: list[list[str]]) -> list[list[str]]:
        return [flags for n, flags in enumerate(sets) if not few or n % 8 == 0 or lasting(library, flags)]

    kernels = ["aliases", "by_value", "calls", "warns"] if few else list(KERNELS)

    def cpp(name: str, target_type: str, arch: str) -> Callable[..., Job]:
        return lambda *flags: tools.compile(KERNELS[name], target_type, arch, *flags)

    targets = [("cubin", arch) for arch in archs] + [("ptx", archs[-1]), ("ltoir", archs[-1])]
    probes = {f"{name} {target} {arch}": cpp(name, target, arch) for name in kernels for target, arch in targets}
    before = [cpp(name, target, archs[0]) for name in ("calls", "aliases") for target in ("ptx", "cubin", "ltoir")]
    found = scan("nvrtc", some("nvrtc", NVRTC), probes, before)
    if tools.nvjitlink is not None:
        found += _scan_linker(tools, some("nvJitLink", NVJITLINK), kernels, archs)
    if tools.nvvm is not None:

        def ir(name: str, target_type: str) -> Callable[..., Job]:
            return lambda *flags: tools.compile_ir(IR_KERNELS[name], target_type, archs[-1], *flags)

        probes = {f"{name} {target}": ir(name, target) for name in IR_KERNELS for target in ("ptx", "ltoir")}
        found += scan("nvvm", some("nvvm", NVVM), probes, list(probes.values()))
    return found


def _scan_linker(
    tools: Toolchain, sets: list[list[str]], kernels: Sequence[str], archs: Sequence[str]
) -> list[Finding]:
    made = {
        (name, kind, arch): run([tools.compile(KERNELS[name], kind, arch)])[0]["made"]["data"]
        for name in kernels
        for kind in ("ltoir", "ptx")
        for arch in archs
    }

    def link(name: str, kind: str, target_type: str, arch: str) -> Callable[..., Job]:
        return lambda *flags: tools.link(made[name, kind, arch], kind, target_type, arch, *flags)

    ways = [("ltoir", "cubin"), ("ltoir", "ptx"), ("ptx", "cubin")]
    probes = {
        f"{name} {kind}→{target} {arch}": link(name, kind, target, arch)
        for name in kernels
        for kind, target in ways
        for arch in archs
    }
    before = [link(name, kind, target, archs[0]) for name in ("calls", "aliases") for kind, target in ways]
    return scan("nvJitLink", sets, probes, before)


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; return 1 if the package's table is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Toolchain.add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the findings to FILE")
    parser.add_argument("--few", action="store_true", help="scan some of the options and kernels, in seconds")
    given = parser.parse_args(arguments)
    tools = Toolchain.given(given)
    found = scan_toolchain(tools, few=given.few)
    print(tools)
    wrong = [one for one in found if one.verdict in {"lasts", "crashed"} and one.expected == "forgotten"]
    wrong += [one for one in found if one.serves is False]
    for one in found:
        note = "" if one.serves is None else f"seen in {len(one.seen)} probes, serves its own: {one.serves}"
        mark = "  <- the table says it is forgotten" if one.verdict == "lasts" and one.expected == "forgotten" else ""
        print(f"{one.library:10} {' '.join(one.flags):45} {one.verdict:10} {note}{mark}")
    if given.json:
        content = {"version": tools.version, "builds": tools.builds, "findings": [asdict(one) for one in found]}
        Path(given.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
