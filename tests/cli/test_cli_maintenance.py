# SPDX-License-Identifier: Apache-2.0
"""``verify``, ``prune``, ``pin``, ``export``, ``import`` and ``check``; all-time counters in ``stats``."""

from __future__ import annotations

import os
import time

import pytest

from cuda_progcache import FileStreamProgramCache


def path_of(root, digest):
    return root / "entries" / digest[:2] / digest[2:]


# verify


def test_verify_a_whole_cache(cli, cli_json, kept, root):
    assert cli("verify").stdout == "3 entries intact (5.1 kB), no problems\n"
    assert cli_json("verify") == {"root": str(root), "ok": True, "whole": 3, "bytes": 5120, "findings": []}


def test_verify_says_what_is_wrong_and_repairs_it(cli, cli_json, kept, root):
    path = path_of(root, kept["saxpy"])
    path.write_bytes(b"!" * 5000)
    text = cli("verify", code=1).stdout
    assert f"corrupt: {path} (5.0 kB)" in text
    assert "2 entries intact (120 B), 1 problem found" in text
    assert "verify --repair" in text
    (finding,) = cli_json("verify", code=1)["findings"]
    assert (finding["kind"], finding["path"], finding["digest"]) == ("corrupt", str(path), kept["saxpy"])
    assert (finding["size"], finding["repaired"]) == (5000, False)
    assert "quarantine" in finding["advice"]
    repaired = cli_json("verify", "--repair")
    assert (repaired["ok"], repaired["findings"][0]["repaired"]) == (True, True)
    assert cli_json("verify")["findings"] == []


def test_verify_in_a_process_gives_the_exit_code(process, kept, root):
    path_of(root, kept["gemm"]).write_bytes(b"")
    assert process("verify").returncode == 1
    assert process("verify", "--repair").returncode == 0


# prune


def aged(root, kept, **days):
    for name, age in days.items():
        then = time.time() - age * 86400
        os.utime(path_of(root, kept[name]), (then, then))


def test_prune(cli, cli_json, kept, root):
    aged(root, kept, saxpy=40, softmax=20, gemm=1)
    would = cli("prune", "--older-than", "30d", "--dry-run", "--mode", "ro").stdout
    assert would == "would remove 1 entry (5.0 kB); 2 entries left (120 B)\n"
    assert cli_json("stats")["bytes"] == 5120
    assert cli("prune", "--older-than", "30d").stdout == would.replace("would remove", "removed")
    assert cli_json("stats")["bytes"] == 120
    cli("pin", kept["softmax"])
    wanted = {"removed": 1, "bytes": 20, "left": 1, "left_bytes": 100, "pinned": 1, "root": str(root)}
    assert cli_json("prune", "--max-size", "0", "--dry-run") == wanted | {"dry_run": True}
    assert cli_json("prune", "--max-size", "0") == wanted | {"dry_run": False}
    assert "1 entry left (100 B, 1 of them pinned)" in cli("prune", "--max-size", "1kB").stdout


@pytest.mark.parametrize(
    ("size", "value"),
    [
        ("0", 0), ("17", 17), ("500B", 500), ("1k", 1000), ("1.5 kB", 1500), ("500MB", 500 * 10**6),
        ("2GiB", 2 * 2**30), ("1ki", 1024), ("3T", 3 * 10**12),
    ],
)  # fmt: skip
def test_sizes(size, value):
    from cuda_progcache.cli.maintenance import parse_size

    assert parse_size(None, None, size) == value


@pytest.mark.parametrize(("span", "value"), [("90min", 5400), ("12h", 43200), ("30d", 2592000), ("1.5w", 907200)])
def test_times(span, value):
    from cuda_progcache.cli.maintenance import parse_time

    assert parse_time(None, None, span) == value


@pytest.mark.parametrize(
    "arguments",
    [[], ["--max-size", "big"], ["--max-size", "-1"], ["--max-size", "1x"], ["--older-than", "30"],
     ["--older-than", "1 month"], ["--max-size", ""]],
)  # fmt: skip
def test_prune_to_what(cli, kept, arguments):
    cli("prune", *arguments, code=2)
    assert "3 entries intact" in cli("verify").stdout


# pin


def test_pin_unpin_and_list(cli, cli_json, kept, root):
    assert cli("pin", kept["softmax"][:8], kept["gemm"]).stdout == f"2 entries pinned in {root}\n"
    listed = cli("pin", "--list").stdout.splitlines()
    assert sorted(line.split()[0] for line in listed) == sorted([kept["softmax"], kept["gemm"]])
    pins = {pin["name"]: pin for pin in cli_json("pin", "--list")["pins"]}
    assert pins["softmax"] == {"digest": kept["softmax"], "name": "softmax", "arch": "sm_100", "size": 100}
    assert cli_json("stats")["pinned"] == 2
    path_of(root, kept["gemm"]).unlink()  # by hand: the pin is left
    assert "not in the cache now" in cli("pin", "--list").stdout
    assert cli_json("pin", "--unpin", kept["gemm"][:8], kept["softmax"])["pins"] == []
    assert "wasn't pinned" in cli("pin", "--unpin", kept["saxpy"]).stderr


def test_pin_needs_something_to_pin(cli, kept):
    for arguments in ([], ["--list", kept["gemm"]], ["--unpin"], ["--unpin", "--list"]):
        cli("pin", *arguments, code=2)
    absent = next(d for d in ("0000", "1111", "2222", "3333") if not any(k.startswith(d) for k in kept.values()))
    cli("pin", absent, code=5)
    cli("pin", "wxyz", code=5)


def test_clear_says_what_is_pinned_and_can_spare_it(cli, cli_json, kept):
    cli("pin", kept["softmax"])
    assert "Remove 3 entries (5.1 kB), 1 of them pinned, from" in cli("clear", stdin="n\n", code=130).stdout
    assert cli_json("clear", "--yes", "--keep-pinned")["removed"] == 2
    assert [pin["name"] for pin in cli_json("pin", "--list")["pins"]] == ["softmax"]
    assert cli_json("clear", "--yes")["removed"] == 1
    assert cli_json("pin", "--list")["pins"] == []


# export, import


def test_export_and_import(cli, cli_json, kept, root, tmp_path):
    bundle = tmp_path / "programs.bundle"
    exported = cli_json("export", bundle)
    assert exported == {
        "root": str(root), "path": str(bundle), "entries": 3, "bytes": bundle.stat().st_size, "damaged": 0,
    }  # fmt: skip
    other = tmp_path / "other"
    assert "imported 3 entries (5.1 kB)\n" in cli("import", bundle, "--cache-dir", other).stdout
    assert "imported 0 entries (0 B); 3 already in the cache" in cli("import", bundle, "--cache-dir", other).stdout
    assert {e["digest"] for e in cli_json("list", "--cache-dir", other)["entries"]} == set(kept.values())


def test_export_and_import_a_part(cli, cli_json, kept, tmp_path):
    bundle = tmp_path / "b"
    assert "2 entries in" in cli("export", bundle, "--arch", "sm_90").stdout
    assert cli_json("export", bundle, "--kernel", "soft*")["entries"] == 1
    cli("export", bundle)
    imported = cli_json("import", bundle, "--arch", "sm_100", "--cache-dir", tmp_path / "other")
    assert (imported["imported"], imported["filtered"]) == (1, 2)


def test_export_leaves_out_what_is_damaged_and_says_so(cli, kept, root, tmp_path):
    path_of(root, kept["saxpy"]).write_bytes(b"!")
    done = cli("export", tmp_path / "b")
    assert "1 damaged entry left out" in done.stderr
    assert "2 entries in" in done.stdout


def test_export_of_nothing(cli, tmp_path):
    assert "nothing to export" in cli("export", tmp_path / "b", code=5).stderr
    assert not (tmp_path / "b").exists()


def test_a_damaged_bundle_is_refused(cli, cli_json, kept, tmp_path):
    bundle = tmp_path / "b"
    cli("export", bundle)
    bundle.write_bytes(bundle.read_bytes()[:3000])
    assert "nothing was imported" in cli("import", bundle, "--cache-dir", tmp_path / "other", code=1).stderr
    assert cli_json("import", bundle, code=1)["error"]["type"] == "BundleError"
    cli("import", tmp_path / "none", code=2)


def test_an_export_to_nowhere_is_one_line(cli, kept, tmp_path):
    error = cli("export", tmp_path / "none" / "b", code=2).stderr
    assert "none" in error


# check


def test_check_a_bundle_and_a_cache(cli, cli_json, kept, root, tmp_path):
    cli("export", tmp_path / "b")
    for path in ([tmp_path / "b"], [root], []):
        done = cli_json("check", *path, "--arch", "sm_100", code=1)
        assert (done["archs"], done["usable"]) == (["sm_100"], 0)
        reasons = {entry["digest"]: entry["reasons"] for entry in done["entries"]}
        assert "cubin for sm_90 doesn't run on sm_100" in reasons[kept["saxpy"]]
        assert all(any("schema 1" in reason for reason in each) for each in reasons.values())
    text = cli("check", "--arch", "sm_100", code=1).stdout
    assert "1: cubin for sm_90 doesn't run on sm_100" in text
    assert "0 of 3 entries can be used here" in text


def test_check_what_was_compiled_here(cli, cli_json, library, tmp_path):
    cli("prewarm", "--manifest", library, "--arch", "sm_90", "--jobs", "1")
    cli("export", tmp_path / "b")
    done = cli_json("check", tmp_path / "b", "--arch", "sm_90")
    assert done["usable"] == len(done["entries"]) == 3
    assert "3 of 3 entries can be used here" in cli("check", tmp_path / "b", "--arch", "sm_90").stdout


def test_check_refuses_what_is_no_architecture(cli, kept):
    assert "sm90" in cli("check", "--arch", "sm90", code=2).stderr


# A cache that isn't there


def test_looking_makes_no_cache(cli, cli_json, root):
    assert "no problems" in cli("verify").stdout
    assert cli_json("prune", "--max-size", "0")["removed"] == 0
    assert cli_json("pin", "--list")["pins"] == []
    assert cli_json("check", "--arch", "sm_90")["entries"] == []
    cli("export", root.parent / "bundle", code=5)
    assert not root.exists()


# stats


def test_stats_tell_what_all_processes_counted(cli, cli_json, kept, process):
    with FileStreamProgramCache() as cache:
        for _ in range(3):
            cache.get(b"one")
        cache.get(b"none")
    text = cli("stats").stdout
    assert "4, 3 hits (75.0%), all time" in text
    assert "3 stored, all time" in text
    counted = cli_json("stats")["all_time"]
    assert (counted["hits"], counted["misses"], counted["stored"]) == (3, 1, 3)
    assert process("stats").returncode == 0
    assert cli_json("stats")["all_time"] == counted  # looking isn't looking up


def test_an_export_of_nothing_is_refused(cli, kept, tmp_path):
    """A misspelt name or architecture is no empty bundle, and doesn't replace the one that is there."""
    bundle = tmp_path / "bundle.tar"
    bundle.write_bytes(b"an older one")
    for arguments, words in (
        (["--kernel", "saxpi.cu"], "saxpy.cu"),
        (["--kernel", "saxpy*", "--kernel", "nothing*"], "nothing*"),
        (["--arch", "sm_99"], "sm_99"),
    ):
        assert words in cli("export", bundle, *arguments, code=5).stderr
        assert bundle.read_bytes() == b"an older one"
