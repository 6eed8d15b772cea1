# SPDX-License-Identifier: Apache-2.0
"""Help, exit codes, errors as one line, start-up, pipes and colours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import click
import pytest

from cuda_progcache import errors
from cuda_progcache.cli.app import COMMANDS, ExitCode, app
from cuda_progcache.cli.help import GROUPS

EVERY = list(COMMANDS)


def test_help_lists_every_command_and_exit_code(cli):
    text = cli("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name}\b", text, re.MULTILINE)
        assert line.split()[0] in text
    for code in ExitCode:
        assert re.search(rf"\b{int(code)}\b", text), code


def test_every_command_is_in_one_group_of_the_help(cli):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    lines = cli("--help").stdout.splitlines()
    for group, names in GROUPS.items():
        start = lines.index(f"{group}:") + 1
        assert [line.split()[0] for line in lines[start : start + len(names)]] == list(names)


@pytest.mark.parametrize("width", [70, 80, 100, 118])
def test_the_help_fits_the_terminal(width):
    """But for commands to be copied, which stay in one line."""
    for name in ("", *EVERY):
        command = app.get_command(click.Context(app), name) if name else app
        text = command.context_class(command, info_name=name, terminal_width=width).get_help()
        long = [line for line in text.splitlines() if len(line) > width]
        assert all(re.match(r"    (cuda-progcache|cuobjdump|eval) ", line) for line in long), (name, long)
        if name in {"compile", "show"}:
            assert "\n    cu" in text  # the examples


@pytest.mark.parametrize("name", EVERY)
def test_each_command_helps_and_speaks_json(cli, name):
    text = cli(name, "--help").stdout
    assert "--json" in text
    assert "--cache-dir" in text
    assert '--json: {"' in text or "--json: the fields that list gives" in text
    command = app.get_command(click.Context(app), name)
    assert command.short_help == COMMANDS[name][1]


def test_a_field_means_the_same_in_the_json_of_every_command():
    helps = {name: app.get_command(click.Context(app), name).epilog for name in EVERY}
    for field, kind in (("ok", "bool"), ("root", "str"), ("bytes", "int"), ("path", "str")):
        kinds = {name: set(re.findall(rf'"{field}": (\w+)', text)) for name, text in helps.items()}
        assert {name: found for name, found in kinds.items() if found - {kind}} == {}
        assert any(kinds.values())


def test_every_option_has_a_help_line_or_a_telling_metavar():
    for name in EVERY:
        for parameter in app.get_command(click.Context(app), name).params:
            if isinstance(parameter, click.Option) and parameter.name != "target_type":
                assert parameter.help, (name, parameter.name)


def test_unknown_command_names_the_nearest(cli):
    assert "did you mean 'list'?" in cli("lits", code=2).stderr
    assert "commands: compile, render" in cli("xyzzy", code=2).stderr


def test_unknown_option_is_usage(cli):
    assert "--josn" in cli("stats", "--josn", code=2).stderr


def test_common_options_stand_before_or_after_the_command(cli, tmp_path, kept):
    before = json.loads(cli("--json", "--cache-dir", tmp_path, "stats").stdout)
    after = json.loads(cli("stats", "--json", "--cache-dir", tmp_path).stdout)
    assert before["root"] == after["root"] == str(tmp_path)
    assert before["entries"] == 0


def test_without_a_command_it_is_the_help_and_no_error(cli):
    told = cli(code=2).stderr
    assert told.startswith("Usage: cuda-progcache")
    assert "error:" not in told
    assert "Try '" not in told


def test_version(cli):
    import cuda_progcache

    assert cli("--version").stdout.strip() == f"cuda-progcache {cuda_progcache.__version__}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CompileError("no"), 1),
        (errors.TemplateError("no"), 1),
        (errors.KernelNotFoundError("no"), 2),
        (errors.ParameterError("no"), 2),
        (errors.ArchError("no"), 2),
        (errors.ManifestError("no"), 2),
        (errors.OptionError("no"), 2),
        (errors.ModeError("no"), 2),
        (errors.ConfigError("no"), 2),
        (errors.UnsafeRootError("no"), 3),
        (errors.StoreError(28, "No space left on device", "/somewhere"), 3),
        (errors.ToolchainError("no"), 4),
        (errors.InspectError("no"), 4),
        (errors.AmbiguousDigestError("ab", ["abcd", "abef"]), 5),
        (OSError(13, "Permission denied", "out.cubin"), 1),
        (ZeroDivisionError("oops"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_each_error_has_its_code_and_one_line(cli, monkeypatch, error, code):
    @click.command()
    def failing():
        raise error

    monkeypatch.setattr(type(app), "get_command", lambda *_: failing)
    lines = cli("stats", code=code).stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cuda-progcache: error: ")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("CUDA_PROGCACHE", "frozn", "did you mean 'frozen'?"),
        ("CUDA_PROGCACHE_MAX_SIZE", "5 apples", "isn't a size such as"),
        ("CUDA_PROGCACHE_TIERS", "cache", "isn't a URL"),
    ],
)
def test_a_wrong_setting_is_wrong_usage(cli, monkeypatch, tmp_path, variable, value, told):
    """One line that names the variable; none is a defect of ours."""
    (tmp_path / "k.cu").write_text('extern "C" __global__ void k() {}')
    monkeypatch.setenv(variable, value)
    (line,) = cli("compile", tmp_path / "k.cu", "--arch", "sm_90", code=2).stderr.splitlines()
    assert variable in line and told in line


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_log_that_is_none_is_said(process):
    script = "compile", "-", "--code-type", "c++", "--arch", "sm_90", "--mode", "off"
    done = process(*script, env={"CUDA_PROGCACHE_LOG": "yes"}, input='extern "C" __global__ void k() {}')
    assert (done.returncode, done.stderr.count("CUDA_PROGCACHE_LOG='yes' is neither explain nor all")) == (0, 1)


NOTHING_THERE = (
    "list", "resources", "top", "stats", "verify", "pin --list", "clear --yes", "prune --older-than 1d", "check",
    "affected x.cu", "list --unkept",
)  # fmt: skip


@pytest.mark.parametrize("command", NOTHING_THERE)
def test_that_there_is_no_cache_is_said_once(cli, root, command):
    (line,) = cli(*command.split()).stderr.splitlines()
    assert line.startswith("cuda-progcache: there is no cache at")
    assert not root.exists()


@pytest.mark.parametrize("command", ["show", "explain", "sass", "provenance", "export out.tar", "report"])
def test_what_is_about_a_program_fails_alike_without_a_cache(cli, root, command):
    name = [] if " " in command or command == "report" else ["beef"]
    assert "error: " in cli(*command.split(), *name, code=ExitCode.NO_ENTRY).stderr
    assert not root.exists()


WRITING = (
    "compile k.cu --arch sm_90 -o", "render axpby -o", "lock --arch sm_90 -o", "export", "report -o",
    "provenance beef -o", "prewarm --report", "prewarm --junit", "check --lock k.cu --junit", "diff a b --markdown",
)  # fmt: skip


@pytest.mark.parametrize("command", WRITING)
def test_a_folder_that_is_not_there_is_told_before_any_work(cli, root, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.cu").write_text('extern "C" __global__ void k() {}')
    told = cli(*command.split(), "no/such/file", code=ExitCode.USAGE).stderr
    assert f"there is no folder {tmp_path}/no/such\n" in told
    assert not root.exists()


@pytest.mark.parametrize("command", ["list --kernel", "resources --kernel"])
def test_a_misspelt_name_is_answered_with_the_nearest(cli, kept, command):
    assert "no program matches; did you mean 'softmax'?" in cli(*command.split(), "sofmax").stderr
    assert "did you mean" not in cli(*command.split(), "softmax", "--arch", "sm_75").stderr


@pytest.mark.parametrize("command", ["show", "explain", "sass", "pin"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("sofmax", "is called sofmax; did you mean 'softmax'? cuda-progcache list shows"),
        ("zzzz", "is called zzzz; cuda-progcache list shows"),
        ("0123456", "has a digest that starts with 0123456, or that name; cuda-progcache list shows"),
    ],
)
def test_a_program_that_is_not_there(cli, kept, command, asked, told):
    (line,) = cli(command, asked, code=ExitCode.NO_ENTRY).stderr.splitlines()
    assert told in line.replace("python -m cuda_progcache", "cuda-progcache")


@pytest.mark.parametrize("asked", ["softmax?dtype=float64", "softmax?dtyp=float16", "softmax@sm_75"])
def test_a_variant_that_is_not_there_is_told_from_the_name(cli, kept, asked):
    (line,) = cli("show", asked, code=ExitCode.NO_ENTRY).stderr.splitlines()
    assert "no program in" in line and f" matches {asked}; " in line
    assert line.endswith("list --kernel softmax shows the programs")


def test_a_defect_shows_its_traceback_when_asked(process, tmp_path):
    script = (
        "import sys, cuda_progcache.cli.output as o; del o.size; from cuda_progcache.cli import main; main(['stats'])"
    )
    for asked in (False, True):
        env = {
            **os.environ,
            "CUDA_PROGCACHE_DIR": str(tmp_path),
            **({"CUDA_PROGCACHE_TRACEBACK": "1"} if asked else {}),
        }
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
        assert ("Traceback" in done.stderr) is asked
        assert done.returncode == (1 if asked else ExitCode.INTERNAL)


def test_errors_are_json_too(cli_json):
    error = cli_json("list", "--since", "soon", code=2)["error"]
    assert set(error) == {"type", "message", "exit_code", "log"}
    assert error["exit_code"] == 2


def test_a_reader_that_leaves_is_no_error(kept, root):
    """As ``list | head -1``, with more output than a pipe holds."""
    from cuda_progcache import FileStreamProgramCache

    with FileStreamProgramCache() as cache:
        for number in range(40):
            cache.publish(str(number), b"x", {"name": f"program-{number:04}-" + "n" * 4000, "arch": "sm_90"})
    command = f"{sys.executable} -m cuda_progcache list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("digest")
    assert done.stderr == ""
    assert done.returncode == ExitCode.BROKEN_PIPE


def test_no_colours_in_a_pipe_or_where_none_are_wanted(kept):
    calls = (["list"], ["show", kept["saxpy"]], ["show", "ffffffff"], ["stats"])
    script = (
        "from cuda_progcache.cli import main\n"
        f"for arguments in {calls}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
    )
    for env in ({}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
        assert "saxpy" in done.stdout and "ffffffff" in done.stderr and "entries" in done.stdout
        assert "\x1b" not in done.stdout + done.stderr


def test_colours_on_a_terminal_unless_no_color(kept):
    """Through a pseudo-terminal, as people see it."""
    import pty

    def seen(env):
        parent, child = pty.openpty()
        command = [sys.executable, "-m", "cuda_progcache", "show", kept["saxpy"]]
        with subprocess.Popen(command, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm-256color", **env}):
            os.close(child)
            text = b""
            try:
                while data := os.read(parent, 65536):
                    text += data
            except OSError:
                pass  # Linux says EIO when the other side of a terminal closes
        os.close(parent)
        return text

    assert b"\x1b[" in seen({})
    plain = seen({"NO_COLOR": "1"})
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", plain)


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"rich", "cuda", "jinja2", "numpy", "msgspec", "platformdirs"}),
        (["stats"], {"rich", "cuda", "jinja2", "numpy"}),
        (["show", "--path", "DIGEST"], {"rich", "cuda", "jinja2", "numpy"}),
        (["list"], {"cuda", "jinja2", "numpy"}),
    ],
    ids=["help", "stats", "show-path", "list"],
)
def test_a_command_imports_what_it_needs(kept, arguments, unwanted):
    arguments = [kept["saxpy"] if each == "DIGEST" else each for each in arguments]
    script = (
        "import sys\n"
        "from cuda_progcache.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stderr.split())


@pytest.mark.parametrize("width", [30, 45, 60, 80, 100, 160])
@pytest.mark.parametrize("columns", [2, 5, 11])
def test_a_table_cuts_no_word_however_narrow_the_terminal(monkeypatch, width, columns):
    """Words are whole on the screen, and numbers with their units, as long as they are no longer than it."""
    from rich.console import Console

    from cuda_progcache.cli import output

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    headings = [f"heading {n}" for n in range(columns)]
    made = output.table(headings, right=headings[1::2])
    words = [[f"word{row}of{n} and more" if n % 2 == 0 else f"{row}{n}.5 kB" for n in range(columns)] for row in (7, 8)]
    for row in words:
        made.add_row(*map(output.text, row))
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(output._fitted(made, console))
    shown = captured.get()
    assert "…" not in shown
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= width
    for n, cell in enumerate(words[0] + words[1]):
        assert all(word in shown for word in ([cell] if n % columns % 2 else cell.split())), cell
    assert all(word in shown for word in " ".join(headings).split())
