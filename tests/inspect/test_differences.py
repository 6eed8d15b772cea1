# SPDX-License-Identifier: Apache-2.0
"""Differences between two binaries: which kernels' code differs, and in which lines and resources."""

from __future__ import annotations

import pytest

from cuda_progcache.errors import InspectError
from cuda_progcache.inspect import diff
from cuda_progcache.inspect.differences import identifier, paired

SCALE = 'extern "C" __global__ void scale(float *a) { a[threadIdx.x] *= FACTOR; }\n'
SUM = """extern "C" __global__ void sum(float *a, int n) {
  float x = 0; for (int i = 0; i < n; ++i) x += a[i]; *a = x;
}
"""


def test_an_edit_shows_in_its_kernel_alone(compiled):
    before = compiled("#define FACTOR 2.0f\n" + SCALE + SUM).data
    after = compiled("#define FACTOR 5.0f\n" + SCALE + SUM).data
    found = diff(before, after)
    assert (found.equal, found.same_code) == (False, False)
    assert {one.name: one.kind for one in found.kernels} == {"scale": "changed", "sum": "same"}
    (scale,) = [one for one in found.kernels if one.name == "scale"]
    changed = [line for line in scale.lines if line[:1] in "+-" and line[:3] not in {"+++", "---"}]
    assert any(line.startswith("+") and line.endswith(", 5") for line in changed), changed
    assert scale.deltas == {}


def test_a_key_can_differ_where_the_code_does_not(compiled):
    before, after = compiled(SUM).data, compiled(SUM, lineinfo=True).data
    found = diff(before, after)
    assert before != after
    assert (found.equal, found.same_code) == (False, True)
    (same,) = diff(before, before).kernels
    assert (same.kind, same.lines, same.before) == ("same", (), same.after)


def test_kernels_come_and_go(compiled):
    before = compiled("#define FACTOR 2.0f\n" + SCALE + SUM).data
    after = compiled(SUM + SUM.replace("sum(", "total(").replace("+=", "-=")).data
    kinds = {one.name: one.kind for one in diff(before, after).kernels}
    assert kinds == {"sum": "same", "total": "changed"}  # the only unmatched kernels, so they are paired
    only = {one.name: one.kind for one in diff(compiled(SUM).data, before).kernels}
    assert only == {"sum": "same", "scale": "added"}
    gone = {one.name: one.kind for one in diff(before, compiled(SUM).data).kernels}
    assert gone == {"sum": "same", "scale": "removed"}


def test_what_is_used_is_told_before_and_after(compiled):
    tight = SUM.replace("void sum", "void __launch_bounds__(64) sum").replace(
        "float x", "__shared__ float s[9]; float x"
    )
    (one,) = diff(compiled(SUM).data, compiled(tight.replace("*a = x", "s[n] = x; *a = s[0]")).data).kernels
    assert one.deltas["shared_bytes"] == (0, 36)
    assert one.deltas["max_threads"] == (None, 64)


def test_instances_of_a_template_are_paired(compiled):
    code = (
        "template <class T> __global__ void twice(T *a) { *a *= 2; }\ntemplate __global__ void twice<TYPE>(TYPE *);\n"
    )
    before, after = (compiled(f"#define TYPE {kind}\n{code}").data for kind in ("float", "double"))
    (one,) = diff(before, after).kernels
    assert (one.name, one.kind) == ("_Z5twiceIdEvPT_", "changed")
    assert any("DADD" in line or "DMUL" in line for line in one.lines)


def test_texts_are_compared_by_line_and_other_bytes_as_a_whole(compiled):
    texts = [compiled(f"#define FACTOR {factor}\n{SCALE}", "ptx").data for factor in ("2.0f", "5.0f")]
    found = diff(*texts)
    assert (found.same_code, found.kernels) == (False, ())
    assert any(line.startswith("+") and "0f40A00000" in line for line in found.lines)
    assert diff(texts[0], texts[0]) == (True, (), ())
    assert diff(b"one", b"two") == (False, (), ())


def test_a_damaged_cubin_is_refused(compiled):
    good = compiled(SUM).data
    with pytest.raises(InspectError, match="is corrupt"):
        diff(good, good[:300])


def test_pairs():
    assert paired(["a", "_Z1fIfEvv", "_Z1fIdEvv", "x"], ["_Z1fIiEvv", "a", "y"]) == {
        "_Z1fIiEvv": "_Z1fIfEvv",
        "a": "a",
    }
    assert paired(["a"], ["b"]) == {"b": "a"}
    names = {"k": "k", "_Z4gemvIfEvPT_": "gemv", "_ZN3lib4gemvIfEEvPT_": "gemv", "_ZN1aIiE1bEv": "a", "_Z": "_Z"}
    assert {name: identifier(name) for name in names} == names
