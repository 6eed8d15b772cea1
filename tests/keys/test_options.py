# SPDX-License-Identifier: Apache-2.0
"""Our option classes against cuda.core's, field by field and value by value."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings

import cuda.core
import pytest

from cuda_progcache import LinkerOptions, ProgramOptions
from cuda_progcache.errors import OptionError
from cuda_progcache.keys.options import (
    _MAX_TRANSLATIONS,
    _translations,
    linker_flags,
    nvrtc_flags,
    nvvm_flags,
    translate,
    unknown_fields,
)

VALUES = [True, False, 1, 0, 3.5, "", "x", [], ["a", "b"], ("a", "b"), [1, 2], [("a", "b"), "c"]]
FIELDS = [f.name for f in dataclasses.fields(cuda.core.ProgramOptions)]
TYPED = [f for f in FIELDS if f not in {"name", "arch", "extra_sources"}]


def flags_or_error(make, *arguments):
    try:
        return make().as_bytes(*arguments)
    except Exception as error:  # noqa: BLE001 - which type it is, is what differs
        return f"refused: {str(error).split('(')[0][:20]}"


def test_fields_and_defaults_are_cuda_cores_and_one_more():
    for kinds in ((ProgramOptions, cuda.core.ProgramOptions), (LinkerOptions, cuda.core.LinkerOptions)):
        ours, theirs = ([(f.name, f.default) for f in dataclasses.fields(kind)] for kind in kinds)
        assert ours == [*theirs, ("extra_flags", None)]


@pytest.mark.parametrize("backend", [("nvrtc", "cubin"), ("nvvm", "ptx"), ("nvvm", "ltoir")])
@pytest.mark.parametrize("name", TYPED)
def test_flags_are_cuda_cores(name, backend):
    for value in VALUES:
        ours = flags_or_error(lambda: ProgramOptions(arch="sm_90", **{name: value}), *backend)  # noqa: B023
        theirs = flags_or_error(lambda: cuda.core.ProgramOptions(arch="sm_90", **{name: value}), *backend)  # noqa: B023
        assert ours == theirs, f"{name}={value!r}"


def test_all_flags_together_come_in_cuda_cores_order():
    given = {name: True for name in TYPED if name not in {"define_macro", "use_libdevice"}} | {
        "define_macro": ["A", ("B", "1")]
    }
    given |= {"include_path": ["i", "j"], "pre_include": "p.h", "ptxas_options": ["-v", "-O2"], "std": "c++20"}
    assert ProgramOptions(arch="sm_90", **given).as_bytes("nvrtc") == cuda.core.ProgramOptions(
        arch="sm_90", **given
    ).as_bytes("nvrtc")


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(cuda.core.LinkerOptions) if f.name not in {"name", "arch"}]
)
def test_linker_flags_are_cuda_cores(name):
    # Slips of the peer: it drops tuples of names, and False for optimize_unused_variables switches it on.
    skipped = {"kernels_used": [("a", "b")], "variables_used": [("a", "b")]}.get(name, [])
    if name == "optimize_unused_variables":
        skipped = [value for value in VALUES if not value]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for value in VALUES:
            if value in skipped:
                continue
            ours = flags_or_error(lambda: LinkerOptions(arch="sm_90", **{name: value}))  # noqa: B023
            theirs = flags_or_error(lambda: cuda.core.LinkerOptions(arch="sm_90", **{name: value}))  # noqa: B023
            assert ours == theirs, f"{name}={value!r}"
            if isinstance(ours, list):
                given = {"arch": "sm_90", name: value}
                flags = linker_flags(LinkerOptions(**given))
                assert flags == linker_flags(cuda.core.LinkerOptions(**given)), f"{name}={value!r}"
                assert not {"true", "false"} & {flag.partition("=")[2] for flag in flags}, "LTO wants 1 and 0"


def test_tuples_of_kernel_names_reach_the_linker():
    assert linker_flags(LinkerOptions(arch="sm_90", kernels_used=("a", "b")))[1:] == [
        "-kernels-used=a",
        "-kernels-used=b",
    ]


def test_cuda_cores_options_give_our_flags():
    theirs = cuda.core.ProgramOptions(arch="sm_90", fma=False, define_macro="X", ptxas_options="-v")
    ours = ProgramOptions(arch="sm_90", fma=False, define_macro="X", ptxas_options="-v")
    assert nvrtc_flags(theirs) == nvrtc_flags(ours)
    assert linker_flags(theirs) == linker_flags(ours) == ["-arch=sm_90", "-fma=0", "-Xptxas=-v"]
    theirs, ours = (c(arch="sm_90", ftz=True) for c in (cuda.core.ProgramOptions, ProgramOptions))
    assert nvvm_flags(theirs, "ltoir") == nvvm_flags(ours, "ltoir") == ["-arch=compute_90", "-ftz=1", "-gen-lto"]


def test_a_field_we_do_not_know_is_kept_verbatim():
    newer = dataclasses.make_dataclass("Newer", [("future", object, None)], bases=(cuda.core.ProgramOptions,))
    assert unknown_fields(newer(arch="sm_90", future=[1, "x"])) == (("future", "[1, 'x']"),)
    assert unknown_fields(newer(arch="sm_90")) == ()
    assert unknown_fields(ProgramOptions(arch="sm_90")) == ()


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        (3, TypeError, "sequence of 2-tuples"),
        ("a", TypeError, "2-tuple"),
        ([["a", "b"]], TypeError, "got list at index 0"),
        ([(1, "x")], TypeError, "name at index 0"),
        ([("a", 3)], TypeError, "got int"),
        ([("a", "")], ValueError, "cannot be empty"),
    ],
)
def test_malformed_extra_sources(sources, error, words):
    for options in (ProgramOptions, cuda.core.ProgramOptions):
        with pytest.raises(error, match=words):
            options(arch="sm_90", extra_sources=sources)


def test_messages_for_bad_values():
    with pytest.raises(TypeError, match="name must be a str, got int"):
        ProgramOptions(name=5)
    with pytest.raises(OptionError, match="define_macro"):
        ProgramOptions(arch="sm_90", define_macro=3).as_bytes("nvrtc")
    with pytest.raises(OptionError, match="lineinfo, max_register_count"):
        ProgramOptions(arch="sm_90", max_register_count=3, lineinfo=True).as_bytes("nvvm")
    with pytest.raises(ValueError, match="Unknown backend 'bogus'"):
        ProgramOptions(arch="sm_90").as_bytes("bogus")
    with pytest.raises(ValueError, match="only supports 'nvjitlink' backend, got 'driver'"):
        LinkerOptions(arch="sm_90").as_bytes("driver")


def test_translations_are_remembered_by_value_and_type():
    def flags(**given):
        return translate(ProgramOptions(arch="sm_90", **given), "c++", "cubin").flags

    for _ in range(2):
        assert flags(max_register_count=1)[1:] == ("--maxrregcount=1",)
        assert flags(max_register_count=True)[1:] == ("--maxrregcount=True",)
        assert flags(max_register_count=1.0)[1:] == ("--maxrregcount=1.0",)
        assert flags(define_macro=("a", "b"))[1:] == ("--define-macro=a=b",)
        assert flags(define_macro=["a", "b"])[1:] == ("--define-macro=a", "--define-macro=b")


def test_options_may_change_between_two_compiles():
    options = ProgramOptions(arch="sm_90", include_path=["a"])
    assert translate(options, "c++", "cubin").include_dirs == ("a",)
    options.include_path.append("b")
    assert translate(options, "c++", "cubin").include_dirs == ("a", "b")
    options.fma = False
    assert "--fmad=false" in translate(options, "c++", "cubin").flags
    assert "--dlink-time-opt" in translate(options, "c++", "ltoir").flags


def test_values_that_cannot_be_remembered():
    path = pathlib.PurePosixPath("a")
    assert translate(ProgramOptions(arch="sm_90", include_path=[path]), "c++", "cubin").include_dirs == ("a",)


def test_bundled_headers_follow_the_environment(monkeypatch):
    for folder in ("/one", "/two"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        flags = translate(ProgramOptions(arch="sm_90", use_bundled_headers=True), "c++", "cubin").flags
        assert flags[1].startswith(f"--use-bundled-headers={folder}/")


def test_not_all_translations_are_kept():
    for number in range(2 * _MAX_TRANSLATIONS):
        translate(ProgramOptions(arch="sm_90", frandom_seed=str(number)), "c++", "cubin")
    assert len(_translations) <= _MAX_TRANSLATIONS


def test_flags_of_a_class_or_an_object_with_as_bytes_of_its_own(monkeypatch):
    """Whoever adds flags that way gets them to the compiler, as through cuda.core, and into the key."""

    class Unrolled(ProgramOptions):
        def as_bytes(self, backend, target_type=None):
            return [*super().as_bytes(backend, target_type), b"--define-macro=UNROLL=4"]

    class Renamed(ProgramOptions):
        pass

    class Linked(LinkerOptions):
        def as_bytes(self, backend="nvjitlink"):
            return [*super().as_bytes(backend), b"-Xptxas=-v"]

    plain = ProgramOptions(arch="sm_90", ftz=True)
    for code_type, target_type in (("c++", "cubin"), ("nvvm", "ptx")):
        flags = translate(plain, code_type, target_type).flags
        assert translate(Renamed(arch="sm_90", ftz=True), code_type, target_type).flags == flags
        more = translate(Unrolled(arch="sm_90", ftz=True), code_type, target_type).flags
        assert more == (*flags, "--define-macro=UNROLL=4")
    assert linker_flags(Linked(arch="sm_90", ftz=True)) == ["-arch=sm_90", "-ftz=1", "-Xptxas=-v"]

    def refuse(*_):
        raise TypeError("not today")

    translate(plain, "c++", "cubin")
    monkeypatch.setattr(plain, "as_bytes", refuse)
    with pytest.raises(TypeError, match="not today"):
        translate(plain, "c++", "cubin")


def test_what_as_bytes_of_its_own_says_is_asked_each_time():
    class Changing(ProgramOptions):
        def as_bytes(self, backend, target_type=None):
            return [*super().as_bytes(backend, target_type), b"-D" + macro]

    options = Changing(arch="sm_90")
    for macro in (b"A", b"B"):
        assert translate(options, "c++", "cubin").flags[-1] == f"-D{macro.decode()}"


def test_what_libnvvm_lacks_is_refused_with_cuda_cores_error_too():
    from cuda.core._utils.cuda_utils import CUDAError

    for options in (ProgramOptions(arch="sm_90", lineinfo=True), cuda.core.ProgramOptions(arch="sm_90", lineinfo=True)):
        with pytest.raises(CUDAError, match="not supported by NVVM backend: lineinfo"):
            translate(options, "nvvm", "ptx")
