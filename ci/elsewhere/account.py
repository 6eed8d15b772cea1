# SPDX-License-Identifier: Apache-2.0
"""Compiles in a first place, visits the others, and judges every answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ci.elsewhere.deploy import Deploy, deploy
from ci.elsewhere.places import OTHER_USER, Environment, Place, built_wheel, make_environment, other_pythons, two_users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ci.elsewhere.programs import Asked

LIBRARY = ("axpby", "softmax", "saxpy_nvvm", "lto_pair", "attention_combine")
"""Kernels of the bundled library that are prewarmed: of every code type, with and without headers, linked or not."""

GOOD = {"hit", "other output", "not kept", "edited"}


@dataclass(frozen=True)
class Judged:
    """An answer held against a fresh compile in the same place.

    Attributes
    ----------
    name : str
        The program's.
    verdict : str
        ``hit``; ``other output``, a miss of which a fresh compile gives other bytes or another log here; ``edited``, a
        miss that names the edited header; ``not kept`` where it was compiled; ``needless miss``; ``wrong hit``.
    why : str
        The reason of a miss, as the product tells it.
    """

    name: str
    verdict: str
    why: str


@dataclass
class Visit:
    """What one place answered.

    Attributes
    ----------
    where : str
        The place and the way the cache came there.
    judged : list of Judged
    faults : list of str
        What else was wrong: a compiler loaded on a hit, a promise of ``check`` that didn't hold.
    """

    where: str
    judged: list[Judged] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Count the verdicts."""
        counts = Counter(judged.verdict for judged in self.judged)
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        return f"{len(self.judged)} programs: {told}" + "".join(f"\n    FAULT {fault}" for fault in self.faults)


@dataclass
class Account:
    """What all places answered, and what could not be tried on this machine."""

    visits: list[Visit] = field(default_factory=list)
    deploy: Deploy = field(default_factory=Deploy)
    skipped: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether no hit was wrong and no miss needless."""
        return all(j.verdict in GOOD for v in self.visits for j in v.judged) and not any(v.faults for v in self.visits)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def prove(
    folder: Path, programs: Iterable[Asked], say: Callable[[str], None] = lambda _: None, *, every_way: bool = True
) -> Account:
    """Compile in one place, and ask in the others.

    Parameters
    ----------
    folder : Path
        An empty directory that every user can enter.
    programs : iterable of Asked
    say : callable
        Told what is being done.
    every_way : bool
        Carry the cache in every way to every place; else to the second place alone, and by bundle to one other.

    Returns
    -------
    Account
    """
    programs = list(programs)
    account = Account()
    say("building the wheel and the environments")
    wheel = built_wheel(folder)
    wheels = tuple(sorted({name for program in programs for name in program.wheels}))
    first = Place(make_environment(folder / "one" / "venv", wheel, wheels=wheels), folder / "first")
    user = OTHER_USER if two_users() else None
    if user is None:
        account.skipped.append("a second user (wants root and setpriv)")
    elsewhere = folder / "somewhere" / "else"
    second = Place(make_environment(elsewhere / "two", wheel, wheels=wheels), elsewhere / "second", user)
    pythons = other_pythons() if every_way else other_pythons()[-1:]
    places = [second, *_other_versions(pythons, elsewhere, wheel, second, wheels, account)]
    for place in (first, second):
        place.furnish()

    say("deploying to a third place")
    (folder / "deploy").mkdir(mode=0o711)
    account.deploy = deploy(folder / "deploy", wheel, first, second)
    say(f"compiling {len(programs)} programs and the kernels {', '.join(LIBRARY)} in the first place")
    cache = first.directory / "home" / "cache"
    made = first.answers(programs, ("files", cache))["answers"]
    _prewarmed(first, cache)
    say("compiling them without a cache in the second place")
    fresh = second.answers(programs, None)["answers"]
    again = first.answers(programs, ("files", cache))["answers"]
    account.visits.append(_judged("the same place, again", again, made, made))
    bundle = folder / "programs.bundle"
    _cli(first, "--cache-dir", str(cache), "export", str(bundle))
    # From here on the first place isn't there, as on another machine.
    away = folder / "away"
    first.directory.rename(away)
    cache = away / "home" / "cache"

    shared = list(range(len(programs)))  # what is found in the second place has to be found in all the others
    for place in places:
        for carried, (kind, path) in _carried(cache, bundle, place).items():
            if not every_way and place is not second and carried != "bundle":
                continue
            where = f"Python {place.environment.version}, by {carried}"
            say(f"asking on {where}")
            asked = [programs[n] for n in shared]
            promised = _checked(place, path) if carried == "copy" else {}
            answered = place.answers(asked, (kind, path))
            there = [made[n] for n in shared]
            visit = _judged(where, answered["answers"], [fresh[n] for n in shared], there)
            _look_for_faults(visit, answered, promised, there)
            if kind == "files":
                visit.faults += _library_faults(place, path)
            account.visits.append(visit)
            if len(shared) == len(programs):
                shared = [n for n in shared if visit.judged[n].verdict in {"hit", "needless miss"}]
    account.visits.append(_after_an_edit(second, programs, cache, made, fresh, say))
    return account


def _other_versions(
    pythons: Iterable[str], folder: Path, wheel: Path, second: Place, wheels: tuple[str, ...], account: Account
) -> Iterable[Place]:
    """Places like the second one on other Pythons."""
    for python in pythons:
        try:
            environment: Environment = make_environment(folder / Path(python).name, wheel, python, wheels)
        except subprocess.CalledProcessError as error:
            account.skipped.append(f"{Path(python).name}: {error.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        yield Place(environment, second.directory, second.user)


def _carried(cache: Path, bundle: Path, place: Place) -> dict[str, tuple[str, Path]]:
    """Bring the cache to a place in every way; return the kind and path of each."""
    home = place.directory / "home" / place.environment.version
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    copy, imported, layer = home / "copy", home / "imported", home / "layer"
    shutil.copytree(cache, copy)
    shutil.copytree(cache, layer)
    place.own(home)
    _cli(place, "--cache-dir", str(imported), "import", str(bundle))
    for path, _, files in os.walk(layer):
        for name in (path, *(os.path.join(path, file) for file in files)):
            os.chown(name, os.getuid(), os.getgid())
            os.chmod(name, 0o555 if name == path else 0o444)
    return {"copy": ("files", copy), "bundle": ("files", imported), "read-only layer": ("layer", layer)}


def _cli(place: Place, *arguments: str) -> str:
    return place.run(["-m", "cuda_progcache", *arguments]).stdout


def _prewarmed(place: Place, cache: Path) -> list[dict[str, Any]]:
    chosen = [part for kernel in LIBRARY for part in ("--kernel", kernel)]
    said = _cli(place, "--cache-dir", str(cache), "--json", "prewarm", "--arch", "sm_90", *chosen)
    items: list[dict[str, Any]] = json.loads(said)["items"]
    return items


def _library_faults(place: Place, cache: Path) -> list[str]:
    missed = [item for item in _prewarmed(place, cache) if item["status"] != "hit"]
    return [f"the library's {item['kernel']} {item['variant']} was {item['status']}" for item in missed]


def _checked(place: Place, cache: Path) -> dict[str, dict[str, Any]]:
    """What ``check`` promises of each entry, by digest."""
    code = (
        "import sys\nfrom cuda_progcache.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as done:\n"
        "    sys.exit(done.code if done.code not in (0, 1) else 0)\n"
    )
    folders = [str(place.project / "include"), *place.filled(["{headers}"])]
    include = [part for folder in folders for part in ("-I", folder)]
    said = place.run(["-c", code, "--cache-dir", str(cache), "--json", "check", *include]).stdout
    return {entry["digest"]: entry for entry in json.loads(said)["entries"]}


def _judged(
    where: str, answers: list[dict[str, Any]], fresh: list[dict[str, Any]], made: list[dict[str, Any]]
) -> Visit:
    visit = Visit(where)
    for answer, here, there in zip(answers, fresh, made, strict=True):
        why = "; ".join(answer.get("why") or ()) or answer.get("reason") or answer.get("error") or ""
        visit.judged.append(Judged(answer["name"], _verdict(answer, here, there), why))
    return visit


def _verdict(answer: dict[str, Any], here: dict[str, Any], there: dict[str, Any]) -> str:
    if "error" in answer or "error" in here:
        return "does not compile"
    output = ("bytes", "symbols", "log")
    if answer["hit"]:
        return "hit" if all(answer[part] == here[part] for part in output) else "wrong hit"
    if there["digest"] is None:
        return "not kept"
    return "needless miss" if all(here[part] == there[part] for part in output) else "other output"


def _look_for_faults(
    visit: Visit, answered: dict[str, Any], promised: dict[str, dict[str, Any]], made: list[dict[str, Any]]
) -> None:
    if answered["compilers"]:
        visit.faults.append(f"the asking process loaded {', '.join(answered['compilers'])}")
    if answered["compiling"] and all(answer.get("hit") for answer in answered["answers"]):
        visit.faults.append("a compiler's process was started, and everything was a hit")
    if answered["cuda_core"]:
        visit.faults.append("the asking process imported cuda.core")
    for answer, there in zip(answered["answers"], made, strict=True):
        entry = promised.get(there.get("digest") or "")
        if entry is not None and entry["usable"] is not None and entry["usable"] != answer.get("hit"):
            told = "; ".join(entry["reasons"]) or "usable"
            visit.faults.append(f"check said of {answer['name']}: {told}; hit: {answer.get('hit')}")


def _after_an_edit(
    place: Place,
    programs: list[Asked],
    cache: Path,
    made: list[dict[str, Any]],
    before: list[dict[str, Any]],
    say: Callable[[str], None],
) -> Visit:
    """Edit one byte of a header in the second place: what saw it misses and names it, everything else is as before.

    What includes nothing of the project's is as it was `before`, and isn't compiled again to be compared with.
    """
    say("asking after an edit of include/tile.h")
    header = place.project / "include" / "tile.h"
    header.write_text(header.read_text(encoding="utf-8").replace("16", "17"), encoding="utf-8")
    copy = place.directory / "home" / "edited"
    shutil.copytree(cache, copy)
    place.own(place.directory)
    answers = place.answers(programs, ("files", copy))["answers"]
    may_see = [n for n, program in enumerate(programs) if program.reads_the_project]
    again = place.answers([programs[n] for n in may_see], None)["answers"]
    fresh = [dict(zip(may_see, again, strict=True)).get(n, answer) for n, answer in enumerate(before)]
    visit = _judged("the second place, after an edit of include/tile.h", answers, fresh, made)
    visit.judged = [
        Judged(j.name, "edited" if j.verdict != "wrong hit" and "tile.h" in j.why else j.verdict, j.why)
        for j in visit.judged
    ]
    return visit
