# SPDX-License-Identifier: Apache-2.0
"""The configured tiers: precedence, places, what is refused, and which files are trusted."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from types import SimpleNamespace

import pytest

from cuda_progcache import CompileService, ConfigError, FileStreamProgramCache, ProgCacheWarning
from cuda_progcache._util.secrets import masked
from cuda_progcache.cli import main
from cuda_progcache.compile import history
from cuda_progcache.store.tiers import behind, configuration
from cuda_progcache.store.tiers.configuration import configured

SECRET = "geheim-7f3a"


@pytest.fixture(autouse=True)
def _project(tmp_path, monkeypatch):
    """Run in a separate project, with nothing configured and nothing cached."""
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS", raising=False)
    (tmp_path / "project" / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "deep" / "down")
    configuration._configured.cache_clear()


@pytest.fixture
def project(tmp_path):
    return tmp_path / "project"


def urls():
    return [tier.url for tier in configured().tiers]


def write(path, text):
    path.write_text(text)
    configuration._configured.cache_clear()
    return str(path)


def test_nothing_is_configured_unless_it_is():
    assert configured() == ((), "")


def test_precedence(project, monkeypatch):
    """A place that says something about tiers hides the places below it."""
    low = write(project / "pyproject.toml", '[tool.cuda_progcache]\ntiers = ["redis://pyproject"]\n')
    assert configured().source == low
    assert urls() == ["redis://pyproject"]
    high = write(project / "cuda_progcache.toml", 'tiers = ["redis://file"]\n')
    assert configured().source == high
    near = write(project / "deep" / "pyproject.toml", "[tool.cuda_progcache]\n")
    assert configured() == ((), near)  # it says that there are no tiers
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", "redis://first https://second/p?mode=ro")
    assert configured().source == "CUDA_PROGCACHE_TIERS"
    assert urls() == ["redis://first", "https://second/p"]
    assert [tier.url for tier in CompileService(tiers=["redis://code"]).cache.tiers] == ["redis://code"]
    assert [tier.url for tier in CompileService().cache.tiers] == ["redis://first", "https://second/p"]
    assert CompileService(tiers=[]).cache.tiers == ()
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", "off")
    assert configured() == ((), "CUDA_PROGCACHE_TIERS")
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", " ")
    assert configured().source == near


def test_which_stores_have_what_is_configured(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", "redis://h")
    for cache, expected in [
        (FileStreamProgramCache(), 1),
        (FileStreamProgramCache(tmp_path / "a"), 0),
        (FileStreamProgramCache(tmp_path / "a", tiers="configured"), 1),
        (CompileService(tmp_path / "a").cache, 1),
        (CompileService(FileStreamProgramCache(tmp_path / "a")).cache, 0),
    ]:
        assert len(cache.tiers) == expected
    with pytest.raises(TypeError, match="path"):
        CompileService(FileStreamProgramCache(tmp_path / "a"), tiers=["redis://h"])
    with pytest.raises(ConfigError):
        CompileService(tiers=["h"])
    with pytest.raises(ConfigError, match="twice"):
        CompileService(tiers=["redis://h", "redis://:x@h"])


def test_a_table_in_a_file_is_relative_to_it(project):
    write(
        project / "pyproject.toml",
        '[[tool.cuda_progcache.tiers]]\nurl = "https://h/p"\nmode = "ro"\ntrust = "signed"\nkeys = ["keys/main.pem"]\n'
        'password_file = "pw"\n[[tool.cuda_progcache.tiers]]\nurl = "file:layer"\n',
    )
    (project / "pw").write_text(SECRET)
    first, second = configured().tiers
    assert first.keys == (str(project / "keys" / "main.pem"),)
    assert first.credentials.password.reveal() == SECRET
    assert second.path == str(project / "layer")


WRONG = {
    'tier = ["redis://h"]': "did you mean 'tiers'?",
    'mode = "ro"': "set CUDA_PROGCACHE",
    "tiers = 3": "must be a list",
    "tiers = [3]": "must be a URL or a table",
    "tiers = [{}]": "must be a URL or a table",
    'tiers = [{url="redis://h", mod="ro"}]': "did you mean 'mode'?",
    'tiers = ["redis://h", "redis://h"]': "twice",
    "tiers = [": "isn't TOML (at ",
    '"redis://:geheim-7f3a@h" = 1': "unknown key",
    f"tiers = [redis://:{SECRET}@h]": "isn't TOML",
    f'tiers = ["redis://:{SECRET}@h?mod=ro"]': "did you mean 'mode'?",
    f'tiers = [{{url="redis://h", password="{SECRET}", timeout="x"}}]': "timeout",
    f'tiers = [{{url="redis://h", pasword="{SECRET}"}}]': "did you mean 'password'?",
}


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("name", ["cuda_progcache.toml", "pyproject.toml"])
def test_what_is_wrong_in_a_file_is_said(project, name, text):
    path = write(project / name, text if name == "cuda_progcache.toml" else f"[tool.cuda_progcache]\n{text}\n")
    with pytest.raises(ConfigError) as refused:
        configured()
    assert str(refused.value).startswith(path)
    assert WRONG[text] in str(refused.value)
    chain, shown = refused.value, []
    while chain is not None:
        shown.append(repr(chain) + repr(vars(chain)))
        chain = chain.__cause__ or chain.__context__
    assert SECRET not in "".join(traceback.format_exception(refused.value)) + "".join(shown)


def test_others_projects_say_nothing(project):
    write(project / "pyproject.toml", "[tool.ruff]\nbroken = \n")  # for other tools to complain about
    write(project / "deep" / "pyproject.toml", '[tool.other]\nuses = "cuda_progcache"\n')
    assert configured() == ((), "")


def test_a_file_that_everyone_can_write_is_passed_over(project):
    write(project / "cuda_progcache.toml", 'tiers = ["redis://above"]\n')
    path = write(project / "deep" / "cuda_progcache.toml", 'tiers = ["redis://h"]\n')
    os.chmod(path, 0o666)
    with pytest.warns(ProgCacheWarning, match="writable by everyone"):
        assert urls() == ["redis://above"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_strangers_file_is_passed_over(project, monkeypatch):
    """The file of the current directory's owner is read, except by root: the owner's code runs here anyway."""
    path = write(project / "cuda_progcache.toml", 'tiers = ["redis://h"]\n')
    os.chown(path, 4321, 4321)
    with pytest.warns(ProgCacheWarning, match="user id 4321"):
        assert urls() == []
    os.chown(os.curdir, 4321, 4321)
    configuration._configured.cache_clear()
    with pytest.warns(ProgCacheWarning, match="user id 4321"):
        assert urls() == []
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    configuration._configured.cache_clear()
    assert urls() == ["redis://h"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners")
def test_nothing_is_trusted_where_the_current_directory_is_gone(project, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    own = SimpleNamespace(st_uid=1234, st_mode=0o644)
    assert configuration._is_trusted("cuda_progcache.toml", own, str(project))
    assert not configuration._is_trusted("cuda_progcache.toml", own, str(project / "gone"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_what_is_put_in_a_files_place_is_not_read(project, monkeypatch):
    """The file that is checked is the file that is read, and a pipe makes nobody wait."""
    path = write(project / "cuda_progcache.toml", 'tiers = ["redis://h"]\n')

    class Os:
        """The os module, but another user's file replaces this one just after it is opened."""

        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, name, flags):
            file = os.open(name, flags)
            if name == path:
                os.unlink(path)
                write(project / "cuda_progcache.toml", 'tiers = ["redis://stranger"]\n')
                os.chown(path, 4321, 4321)
            return file

    monkeypatch.setattr(configuration, "os", Os())
    assert urls() == ["redis://h"]
    monkeypatch.setattr(configuration, "os", os)
    os.unlink(path)
    os.mkfifo(path)
    os.chown(path, 4321, 4321)
    configuration._configured.cache_clear()
    with pytest.warns(ProgCacheWarning, match="user id 4321"):
        assert urls() == []


def test_a_directory_that_is_gone_configures_nothing(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert configured() == ((), "")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    told = capsys.readouterr()
    return ended.value.code or 0, told.out, told.err


def test_config_shows_each_value_and_where_it_came_from(project, monkeypatch, capsys):
    monkeypatch.setenv("PASS", SECRET)
    path = write(project / "cuda_progcache.toml", 'tiers = ["redis://ci:${PASS}@h?mode=ro", "https://t:x1y2@i/p"]\n')
    code, out, _ = run(capsys, "config", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["tiers"]["source"] == path
    first, second = told["tiers"]["tiers"]
    assert (first["url"], first["mode"], first["password"]) == ("redis://h", "ro", "variable PASS")
    assert second["password"] == "given"
    assert {one["name"]: one["source"] for one in told["settings"]}["CUDA_PROGCACHE_DIR"] == "environment"
    _, table, _ = run(capsys, "config")
    assert path in table
    assert "redis://h" in table
    assert SECRET not in out + table
    assert "x1y2" not in out + table


WITH_SECRETS = [
    f"redis://:{SECRET}@127.0.0.1:1",
    f"https://{SECRET}@127.0.0.1:1/x?token={SECRET}",
    f"redis://{SECRET}@",
]


@pytest.mark.parametrize(
    ("value", "command"),
    [*((value, command) for value in WITH_SECRETS for command in ("config", "config --json")),
     (WITH_SECRETS[1], "doctor")],
)  # fmt: skip
def test_no_command_shows_a_secret(monkeypatch, capsys, command, value):
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", value)
    monkeypatch.setenv("CUDA_PROGCACHE_TIER", value)  # nothing reads this variable
    code, out, err = run(capsys, *command.split())
    assert SECRET not in out + err
    assert "Traceback" not in err
    assert code in {0, 1, 2}


@pytest.mark.parametrize(
    "word",
    [f"--store=redis://:{SECRET}@h", f"redis://u:a b@{SECRET}@h", f"https://h?mode=ro&token={SECRET}",
     f"redis://a redis://:{SECRET}@h", f"s3://h?PASSWORD={SECRET}#x"],
)  # fmt: skip
def test_no_record_has_a_secret_of_a_command_line(monkeypatch, tmp_path, word):
    """Records contain the command line of the process that compiled a program."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "serve.py", word, "--port", "80"])
    made = CompileService(tmp_path).compile('extern "C" __global__ void f() {}', options={"arch": "sm_80"})
    cache = FileStreamProgramCache(tmp_path)
    assert "serve.py" in str(history.Makers(cache).of(cache.info(made.digest)))
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert SECRET.encode() not in file.read()


def test_what_is_no_secret_is_shown():
    assert masked("redis://cache:6379/0?mode=ro") == "redis://cache:6379/0?mode=ro"
    assert masked("user@host a=b") == "user@host a=b"
    assert masked("redis://ci:abc@cache:6379/0") == "redis://***@cache:6379/0"


#: Commands that show what was compiled with tiers behind the cache, in the order in which they run.
COMMANDS = [
    "compile p.cu --arch sm_80 -o out.cubin",
    "compile p.cu --arch sm_80 --json",
    "compile broken.cu --arch sm_80",
    "list --json",
    "show p.cu --json",
    "explain --last",
    "provenance p.cu",
    "stats --json",
    "lock --from run.json -o progcache.lock",
    "check --lock progcache.lock --json",
    "export --lock progcache.lock out.tar",
    "tiers --json",
    "config --json",
    "compile p.cu --arch sm_90 --mode frozen",
]


def test_no_place_has_a_secret(monkeypatch, tmp_path, capfd):
    """No secret of the environment or the command line is in what is printed, logged or written.

    The written files include the records from which reports are made.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(behind, "_opened", {})
    monkeypatch.setenv("TIER_TOKEN", SECRET)
    url = f"redis://ci:{SECRET}@127.0.0.1:1?connect_timeout=0.1"
    other = f"https://127.0.0.1:1/a?token=${{TIER_TOKEN}}&connect_timeout=0.1&password={SECRET}"
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"{url} {other}")
    monkeypatch.setattr(sys, "orig_argv", ["python", "serve.py", url, f"--store={other}"])
    monkeypatch.setenv("CUDA_PROGCACHE_RECORD", "run.json")
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "p.cu").write_text('extern "C" __global__ void p(int *a) { *a = 1; }')
    (tmp_path / "broken.cu").write_text("this is no program")
    log = logging.FileHandler("log")
    logging.getLogger().addHandler(log)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    shown = {}
    try:
        for command in COMMANDS:
            with pytest.raises(SystemExit):
                main(command.split())
            told = capfd.readouterr()
            assert "internal error" not in told.err, (command, told)
            shown[command] = told.out + told.err
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    assert "redis://127.0.0.1:1" in shown["tiers --json"]
    assert [command for command, text in shown.items() if SECRET in text] == []
    written = [os.path.join(at, name) for at, _, names in os.walk(tmp_path) for name in names]
    assert {"run.json", "progcache.lock", "log", "out.tar"} <= {os.path.basename(one) for one in written}
    found = []
    for path in written:
        with open(path, "rb") as file:
            if SECRET.encode() in file.read():
                found.append(path)
    assert found == []
