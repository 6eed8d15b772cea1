# SPDX-License-Identifier: Apache-2.0
"""Flags are read as the compilers read them, in every spelling."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_progcache import ProgramOptions
from cuda_progcache.errors import OptionError
from cuda_progcache.keys.flags import facts, read_flags, without
from cuda_progcache.keys.lasting import lasting
from cuda_progcache.keys.options import NVRTC, nvrtc_flags

# One option, spelled in each way that NVRTC 13.5 takes.
SPELLINGS = {
    ("device-debug", None): [("-G",), ("--device-debug",), (" -G",), ("-G ",)],
    ("generate-line-info", None): [("-lineinfo",), ("--generate-line-info",)],
    ("restrict", None): [("-restrict",), ("--restrict",)],
    ("include-path", "inc"): [
        *[("-Iinc",), ("-I inc",), ("-I  inc",), ("-I=inc",), ("-I=inc ",), ("-I", "inc"), ("-I", " inc ")],
        *[("--include-path=inc",), ("--include-path=inc ",), ("--include-path", "inc")],
    ],
    ("define-macro", "N=3"): [
        *[("-DN=3",), ("-D N=3",), ("-D=N=3",), ("-D", "N=3"), ("--define-macro=N=3",), ("--define-macro", "N=3 ")]
    ],
    ("undefine-macro", "N"): [("-UN",), ("-U N",), ("-U", "N"), ("--undefine-macro=N",), ("--undefine-macro", "N")],
    ("pre-include", "p.h"): [("-include=p.h",), ("-include", "p.h"), ("--pre-include=p.h",), ("--pre-include", "p.h")],
    ("std", "c++20"): [("-std=c++20",), ("--std=c++20",)],
    ("fmad", "false"): [("-fmad=false",), ("--fmad=false",), ("-fmad", "false"), ("--fmad", "false")],
    ("ptxas-options", "-v"): [("-Xptxas", "-v"), ("-Xptxas=-v",), ("--ptxas-options=-v",), ("--ptxas-options", "-v")],
    ("gpu-architecture", "sm_80"): [
        *[("-arch=sm_80",), ("-arch", "sm_80"), ("--gpu-architecture=sm_80",), ("--gpu-architecture", "sm_80")]
    ],
    ("optimization-info", "inline"): [("-opt-info=inline",), ("--optimization-info=inline",)],
    ("time", "t"): [("-time=t",), ("--time=t",)],
}


@pytest.mark.parametrize("option", SPELLINGS, ids=lambda option: option[0])
def test_every_spelling_is_one_option(option):
    for words in SPELLINGS[option]:
        for others in ((), ("--fmad", "true"), ("-DX",)):
            read = list(read_flags([*others, *words, *others]))
            mine = [flag for flag in read if (flag.name, flag.value) == option]
            assert [flag.words for flag in mine] == [words], words
            assert [word for flag in read for word in flag.words] == [*others, *words, *others]


def test_a_value_is_no_option():
    """NVRTC takes the next word for a directory, a macro or ptxas's option, whatever it begins with."""
    said = facts(("-I", "-G", "-D", "-lineinfo", "-Xptxas", "-G", "-include", "--pch"))
    assert (said.debug, said.lineinfo, said.precompiled) == (False, False, ())
    assert said.include_dirs == ("-G",)
    assert said.pre_includes == ("--pch",)


def test_what_lasts_is_seen_in_every_spelling():
    lasts = {"-restrict", "--restrict", "-G", "-opt-info=inline", "-Ofc max", "--something-new"}
    forgotten = ["-DX", "-lineinfo", "-I", "a", "-Ib", "-Xptxas", "-v", "-fmad=false", "-rdc", "true", "-std=c++20"]
    words = ["-restrict", "--restrict", "-G", "-opt-info=inline", "-Ofc", "max", "--something-new"]
    assert lasting("nvrtc", [*forgotten, *words, *forgotten]) == lasts
    assert lasting("nvrtc", ["-pch", "-pch-dir=x", "-G"]) == {"--pch", "-G"}
    assert lasting("nvJitLink", ["-arch=sm_80", "-lineinfo", "-Xptxas=-v", "-O3", "-g", "-O0"]) == {"-g", "-O0"}
    assert lasting("nvvm", ["-arch=compute_80", "-g", "-opt=3", "-Xopt", "-x"]) == {"-Xopt -x"}


def test_without():
    assert without(["-G", "-I", "a", "-Ib", "-DX", "--include-path=c", "--fmad", "true"], "include-path") == [
        *["-G", "-DX", "--fmad", "true"]
    ]


WORDS = st.text(string.ascii_letters + "-_=+/. ", max_size=12)
OPTIONS = st.sampled_from([words for spelled in SPELLINGS.values() for words in spelled])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(OPTIONS, WORDS.map(lambda word: (word,)))))
def test_no_word_is_lost_or_moved(groups):
    words = [word for group in groups for word in group]
    assert [word for flag in read_flags(words) for word in flag.words] == words
    facts(tuple(words))


WRITES = [
    *[("--time=t.csv",), ("-time=t.csv",), ("--create-pch=x.pch",), ("-create-pch=x.pch",)],
    *[("--fdevice-time-trace=t",), ("-fdevice-time-trace=t",)],
    *[("-Xptxas", "--link-info=x"), ("-Xptxas=-link-info=x",), ("--ptxas-options=--debug-info=x",)],
    *[("--ptxas-options", "-o=x"), ("-Xptxas=-o", "-Xptxas=x"), ("-Xptxas", "--output-file", "-Xptxas", "x")],
]
READS = [
    *[("--ptxas-options=--options-file=o",), ("--ptxas-options=-optf=o",), ("-Xptxas", "-optf=o")],
    *[("-Xptxas", "--options-file", "-Xptxas", "o"), ("-Xptxas=-optf", "--ptxas-options=o"), ("-Xptxas", 'optf="o"')],
    *[("-Xptxas=--apply-controls=o",), ("-Xptxas=-apply-controls=o",), ("-Xptxas", "o"), ("-Xptxas=-v", "-Xptxas=o")],
    *[
        ("-Xnvvm", "-apply-controls=o"),
        ("-Xnvvm", "-Xopt", "-Xnvvm", "@o"),
        ("-Xnvvm=-Xllc", "-Xnvvm=-info-output-file=o"),
    ],
    *[("-Xcudafe", "--error_output=o"), ("-Xcudafe", "--include_directory", "-Xcudafe", "o"), ("-Xcudafe=@o",)],
    *[("--keep",), ("--keep-dir=o",), ("--dump-callgraph",), ("-save-temps",), ("--options-file=o",), ("-optf", "o")],
    *[("--future-report-file=o",), ("-o", "o"), ("--trace_to", "o")],
]
NEITHER = [
    *[("-Xptxas", "-v"), ("-Xptxas=-O3",), ("-Xptxas", "-e", "-Xptxas", "k"), ("-Xptxas", "--entry=k")],
    *[("-DFILE=o.txt",), ("-D", "dump=trace"), ("-Iinclude/dir",), ("-include=pre.h",), ("--include-path", "log")],
    *[("--pch-verbose=true",), ("--instantiate-templates-in-pch",), ("-Xcudafe", "--diag_suppress=177")],
    *[("-Xcudafe", "--display_error_number"), ("--fmax-errors", "3"), ("-Werror=reorder",), ("--enable-tile",)],
    *[("--use-bundled-headers=x",), ("-Xnvvm", "-opt=3")],
]


@pytest.mark.parametrize("words", WRITES, ids=" ".join)
def test_what_writes_files(words):
    assert facts(("-arch=sm_80", *words)).writes


@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_what_reads_files(words):
    assert facts(("-arch=sm_80", *words)).reads


@pytest.mark.parametrize("words", NEITHER, ids=" ".join)
def test_what_does_neither(words):
    said = facts(("-arch=sm_80", *words))
    assert not said.writes
    assert not said.reads


def test_nvjitlinks_time_goes_to_its_log():
    assert not facts(("-arch=sm_80", "-time"), "link").writes
    assert facts(("-arch=sm_80", "-Xptxas=-optf=o"), "link").reads


def test_no_field_is_taken_for_a_file():
    """But for those of which it is known: options of ours have names that are no news."""
    for field, emit in NVRTC.items():
        try:
            words = tuple(emit("x"))
        except OptionError:
            continue
        said = facts(words)
        assert not said.reads or field == "ptxas_options", words
        assert bool(said.writes) == (field in {"create_pch", "time", "fdevice_time_trace"})
        assert bool(said.precompiled) == (field in {"pch", "use_pch", "pch_dir"})


class TestExtraFlags:
    def test_come_last_and_verbatim(self):
        options = ProgramOptions(arch="sm_80", std="c++20", extra_flags=("-Werror", "reorder", " -DX"))
        assert nvrtc_flags(options) == ["-arch=sm_80", "--std=c++20", "-Werror", "reorder", " -DX"]
        assert options.as_bytes("nvrtc") == [b"-arch=sm_80", b"--std=c++20", b"-Werror", b"reorder", b" -DX"]
        assert ProgramOptions(arch="compute_80", extra_flags="-Xopt").as_bytes("nvvm", "ltoir") == [
            *[b"-arch=compute_80", b"-Xopt", b"-gen-lto"]
        ]

    @pytest.mark.parametrize("flag", ["-arch=sm_90", "--gpu-architecture=sm_90", " -arch=sm_80"])
    def test_the_architecture_is_a_field(self, flag):
        with pytest.raises(OptionError, match="set arch= instead"):
            nvrtc_flags(ProgramOptions(arch="sm_80", extra_flags=(flag,)))

    @pytest.mark.parametrize(
        ("fields", "extra"),
        [
            ({"std": "c++17"}, ("-std=c++20",)),
            ({"fma": True}, ("--fmad", "false")),
            ({"max_register_count": 32}, ("-maxrregcount=64",)),
            ({}, ("-std=c++17", "--std=c++20")),
            ({}, ("--fmax-errors", "3", "--fmax-errors=4")),
        ],
    )
    def test_one_option_has_one_value(self, fields, extra):
        with pytest.raises(OptionError, match="is given twice with different values"):
            nvrtc_flags(ProgramOptions(arch="sm_80", extra_flags=extra, **fields))

    def test_what_adds_up_may_come_again(self):
        extra = ("-DX=1", "-DX=2", "-Ia", "-Ib", "-Xptxas", "-v", "-Xptxas", "-O2", "--diag-suppress=1", "-std=c++20")
        fields = {"define_macro": "Y", "include_path": "c", "std": "c++20", "diag_suppress": 2, "debug": True}
        assert nvrtc_flags(ProgramOptions(arch="sm_80", extra_flags=(*extra, "-G"), **fields))[-len(extra) - 1 :] == [
            *[*extra, "-G"]
        ]

    @pytest.mark.parametrize("wrong", [3, [3], (b"-G",), {"-G": 1}, ["-G", None]])
    def test_are_words(self, wrong):
        with pytest.raises(TypeError, match="extra_flags must be a str or a sequence of them"):
            ProgramOptions(extra_flags=wrong)
