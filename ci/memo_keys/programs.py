# SPDX-License-Identifier: Apache-2.0
"""Small programs with one random edit or mutation each, memoized by both front ends beside the plain function.

A program is a module of one's own, made of one to three of :data:`FEATURES`, and a function that uses them. In one of
them a value is edited between two processes, or set while the process runs; or something is edited that means nothing.
A process runs all programs before, another one after. A result that isn't the plain function's is a wrong hit; a run
although nothing changed that means something is a needless miss, and is counted by what was edited.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Feature(NamedTuple):
    """One way in which a result depends on a value of a module.

    Attributes
    ----------
    source : str
        Of the module; ``@`` is the value, a digit, but before a name; a name that ends in ``_`` is the feature's own.
    use : str
        An expression, in which ``lib`` is the module.
    change : str
        Statements that change the value while the process runs; nothing: it can't be.
    lazy : bool
        Whether the function imports the module when it runs.
    """

    source: str
    use: str
    change: str = ""
    lazy: bool = False


FEATURES = {
    "constant": Feature("K_ = @", "lib.K_", "lib.K_ = 7"),
    "global by getattr": Feature("K_ = @", "getattr(lib, 'K_')", "lib.K_ = 7"),
    "list": Feature("L_ = [1, @]", "sum(lib.L_)", "lib.L_.append(7)"),
    "nested dict": Feature("D_ = {'a': [{'b': @}]}", "lib.D_['a'][0]['b']", "lib.D_['a'][0]['b'] = 7"),
    "dict with a logger": Feature("import logging\nD_ = {'k': @, 'log': logging.getLogger('x')}", "lib.D_['k']",
                                  "lib.D_['k'] = 7"),
    "set": Feature("S_ = {1, 10 * @}", "sum(lib.S_)", "lib.S_.add(7)"),
    "tuple holding a list": Feature("T_ = ([@],)", "lib.T_[0][0]", "lib.T_[0][0] = 7"),
    "deque": Feature("from collections import deque\nQ_ = deque([@])", "lib.Q_[0]", "lib.Q_[0] = 7"),
    "ChainMap": Feature("from collections import ChainMap\nC_ = ChainMap({}, {'a': @})", "lib.C_['a']",
                        "lib.C_['a'] = 7"),
    "mapping proxy": Feature("import types\n_B_ = {'a': @}\nM_ = types.MappingProxyType(_B_)", "lib.M_['a']",
                             "lib._B_['a'] = 7"),
    "SimpleNamespace": Feature("import types\nN_ = types.SimpleNamespace(a=types.SimpleNamespace(b=@))", "lib.N_.a.b",
                               "lib.N_.a.b = 7"),
    "array": Feature("import numpy as np\nA_ = np.array([1, @])", "int(lib.A_.sum())", "lib.A_[0] = 7"),
    "array of objects": Feature("import numpy as np\nA_ = np.array([[@], None], dtype=object)", "lib.A_[0][0]",
                                "lib.A_[0][0] = 7"),
    "function": Feature("def g_(): return @", "lib.g_()", "lib.g_ = lambda: 7"),
    "function named add": Feature("def add(a, b): return a + b * @", "lib.add(1, 1)", "lib.add = lambda a, b: 7"),
    "function by its code": Feature("def g_(): return @", "lib.g_()", "lib.g_.__code__ = (lambda: 7).__code__"),
    "default": Feature("def g_(a=@): return a", "lib.g_()", "lib.g_.__defaults__ = (7,)"),
    "keyword default": Feature("def g_(*, a=@): return a", "lib.g_()", "lib.g_.__kwdefaults__['a'] = 7"),
    "attribute of a function": Feature("def g_(): return g_.k\ng_.k = @", "lib.g_()", "lib.g_.k = 7"),
    "closure": Feature("def m_(n):\n    return lambda: n\ng_ = m_(@)", "lib.g_()",
                       "lib.g_.__closure__[0].cell_contents = 7"),
    "helper of a helper": Feature("K_ = @\ndef a_(): return K_\ndef b_(): return a_()", "lib.b_()", "lib.K_ = 7"),
    "generator": Feature("def g_():\n    yield @", "sum(lib.g_())"),
    "comprehension": Feature("K_ = @\ndef g_(): return sum(K_ for _ in range(2))", "lib.g_()", "lib.K_ = 7"),
    "lambda in a dict": Feature("R_ = {'a': lambda: @}", "lib.R_['a']()", "lib.R_['a'] = lambda: 7"),
    "functions in a set": Feature("def g_(): return @\nS_ = frozenset({g_})", "sum(h() for h in lib.S_)"),
    "registry": Feature("R_ = {}\ndef r_(f):\n    R_[f.__name__] = f\n    return f\n@r_\ndef g_(): return @",
                        "lib.R_['g_']()", "lib.R_['g_'] = lambda: 7"),
    "partial": Feature("from functools import partial\nP_ = partial(lambda d: d['a'], {'a': @})", "lib.P_()",
                       "lib.P_.args[0]['a'] = 7"),
    "bound method": Feature("class C_:\n    def __init__(self): self.k = @\n    def g(self): return self.k\nc_ = C_()\n"
                            "m_ = c_.g", "lib.m_()", "lib.c_.k = 7"),
    "lru_cache": Feature("import functools\n@functools.lru_cache\ndef g_(): return @", "lib.g_()"),
    "lru_cache that lies": Feature("import functools\ng_ = functools.lru_cache(lambda: @)\ng_.__wrapped__ = len",
                                   "lib.g_()"),
    "singledispatch": Feature("import functools\n@functools.singledispatch\ndef g_(x): return 0\n@g_.register\n"
                              "def _(x: int): return @", "lib.g_(1)"),
    "wraps a function of the library": Feature("import functools, math\n@functools.wraps(math.sqrt)\n"
                                               "def g_(x): return @", "lib.g_(4)"),
    "decorator": Feature("import functools\ndef d_(f):\n    @functools.wraps(f)\n    def w(*a): return f(*a) + @\n"
                         "    return w\n@d_\ndef g_(): return 0", "lib.g_()"),
    "decorator class": Feature("class d_:\n    def __init__(self, f): self.f = f\n"
                               "    def __call__(self): return self.f()\n@d_\ndef g_(): return @", "lib.g_()",
                               "lib.g_.f = lambda: 7"),
    "decorator of a package": Feature("import contextlib\n@contextlib.contextmanager\ndef g_():\n    yield @",
                                      "[v for v in [lib.g_()] for v in [v.__enter__()]][0]"),
    "vectorize": Feature("import numpy as np\ng_ = np.vectorize(lambda x: @)", "int(lib.g_(1))"),
    "frompyfunc": Feature("import numpy as np\ng_ = np.frompyfunc(lambda x: @, 1, 1)", "int(lib.g_(1))"),
    "itemgetter": Feature("import operator\ng_ = operator.itemgetter(@)", "lib.g_([5, 6, 8, 9])"),
    "weak reference": Feature("import weakref\ndef g_(): return @\nw_ = weakref.ref(g_)", "lib.w_()()"),
    "context variable": Feature("import contextvars\nv_ = contextvars.ContextVar('v', default=@)", "lib.v_.get()",
                                "lib.v_.set(7)"),
    "class attribute": Feature("class C_:\n    k = @", "lib.C_.k", "lib.C_.k = 7"),
    "method": Feature("class C_:\n    def g(self): return @", "lib.C_().g()", "lib.C_.g = lambda self: 7"),
    "method of a base": Feature("class B_:\n    def g(self): return @\nclass C_(B_): pass\nc_ = C_()", "lib.c_.g()",
                                "lib.C_.g = lambda self: 7"),
    "method named update": Feature("class C_:\n    def update(self, a): return a * @\nc_ = C_()", "lib.c_.update(1)"),
    "static method": Feature("class C_:\n    @staticmethod\n    def insert(a): return a * @", "lib.C_.insert(1)"),
    "class method": Feature("class C_:\n    k = @\n    @classmethod\n    def g(cls): return cls.k", "lib.C_.g()",
                            "lib.C_.k = 7"),
    "property": Feature("K_ = @\nclass C_:\n    @property\n    def g(self): return K_", "lib.C_().g", "lib.K_ = 7"),
    "cached property": Feature("import functools\nclass C_:\n    @functools.cached_property\n    def g(self): return @",
                               "lib.C_().g"),
    "descriptor": Feature("class D_:\n    def __get__(self, i, o): return @\nclass C_:\n    g = D_()", "lib.C_.g"),
    "__getattr__": Feature("class C_:\n    def __getattr__(self, n): return @\nc_ = C_()", "lib.c_.any"),
    "metaclass call": Feature("class M_(type):\n    def __call__(cls): return @\nclass C_(metaclass=M_): pass",
                              "lib.C_()"),
    "subclasses": Feature("class B_:\n    pass\nclass C_(B_):\n    k = @", "lib.B_.__subclasses__()[0].k",
                          "lib.C_.k = 7"),
    "init_subclass": Feature("class B_:\n    all = []\n    def __init_subclass__(cls): B_.all.append(cls.k)\n"
                             "class C_(B_):\n    k = @", "sum(lib.B_.all)", "lib.B_.all.append(7)"),
    "instance": Feature("class C_:\n    def __init__(self): self.k = @\nc_ = C_()", "lib.c_.k", "lib.c_.k = 7"),
    "instance with slots": Feature("class C_:\n    __slots__ = ('k',)\nc_ = C_()\nc_.k = @", "lib.c_.k",
                                   "lib.c_.k = 7"),
    "instance in a list": Feature("class C_:\n    def __init__(self): self.k = @\nL_ = [C_()]", "lib.L_[0].k",
                                  "lib.L_[0].k = 7"),
    "instance that becomes another's": Feature(
        "class A_:\n    def g(self): return @\nclass B_:\n    def g(self): return 7\nc_ = A_()", "lib.c_.g()",
        "lib.c_.__class__ = lib.B_"),
    "callable instance": Feature("class C_:\n    k = 0\n    def __call__(self): return self.k\nc_ = C_()\nc_.k = @",
                                 "lib.c_()", "lib.c_.k = 7"),
    "dict subclass": Feature("class C_(dict):\n    extra = 0\nc_ = C_(a=@)", "lib.c_['a']", "lib.c_['a'] = 7"),
    "str subclass": Feature("class C_(str):\n    pass\nc_ = C_('a')\nc_.k = @", "lib.c_.k", "lib.c_.k = 7"),
    "dataclass": Feature("from dataclasses import dataclass\n@dataclass\nclass C_:\n    k: int = @", "lib.C_().k"),
    "frozen dataclass": Feature("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C_:\n    k: list\n"
                                "c_ = C_([@])", "lib.c_.k[0]", "lib.c_.k[0] = 7"),
    "dataclass flags": Feature("from dataclasses import dataclass, field\n@dataclass\nclass C_:\n"
                               "    k: int = field(default=0, compare=@ > 1)", "int(lib.C_(1) == lib.C_(2))"),
    "named tuple": Feature("from collections import namedtuple\nN_ = namedtuple('N_', 'a')\nn_ = N_([@])",
                           "lib.n_.a[0]", "lib.n_.a[0] = 7"),
    "enum value": Feature("import enum\nclass E_(enum.Enum):\n    A = @", "lib.E_.A.value"),
    "enum method": Feature("import enum\nclass E_(enum.Enum):\n    A = 1\n    def g(self): return @", "lib.E_.A.g()"),
    "enum missing": Feature("import enum\nclass E_(enum.Enum):\n    A = 1\n    B = 2\n    @classmethod\n"
                            "    def _missing_(cls, v): return cls(@)", "lib.E_(9).value"),
    "match args": Feature("class C_:\n    __match_args__ = ('a', 'b')[@ - 1:]\n    a, b = 1, 2",
                          "len(lib.C_.__match_args__)"),
    "pattern": Feature("import re\np_ = re.compile('a{@}')", "int(bool(lib.p_.fullmatch('aa')))"),
    "module's __getattr__": Feature("def __getattr__(name):\n    if name == 'K_': return @\n    raise AttributeError",
                                    "lib.K_"),
    "environment": Feature("K_ = @", "lib.K_ * 0 + int(os.environ.get('MEMO_KEYS_ENV', '1'))",
                           "os.environ['MEMO_KEYS_ENV'] = '7'"),
    "lazy import": Feature("K_ = @", "lib.K_", "sys.modules[LIB].K_ = 7", lazy=True),
    "lazy function": Feature("def g_(): return @", "lib.g_()", "sys.modules[LIB].g_ = lambda: 7", lazy=True),
    "lazy list": Feature("L_ = [@]", "lib.L_[0]", "sys.modules[LIB].L_[0] = 7", lazy=True),
}  # fmt: skip

#: Edits of a module that mean nothing.
NEUTRAL = {
    "nothing": lambda text: text,
    "comment": lambda text: "# told\n\n\n" + text,
    "docstring": lambda text: '"""Told."""\n' + text,
    "function nobody calls": lambda text: text + "\ndef nobody(): return 5\n",
    "annotation": lambda text: text.replace("): return", ") -> object: return"),
}

_FUNCTION = """
import os, sys
LIB = {lib!r}
{head}
def f(x):
    {body}
    return x + {uses}
"""

#: Runs every program, and says of each what came out.
CHILD = """
import importlib, json, os, sys, warnings
warnings.simplefilter("ignore")
from cuda_progcache.memo.memoize import memoize
from cuda_progcache.memo.cache_file import cache_file
os.environ.pop("MEMO_KEYS_ENV", None)
place, phase = sys.argv[1:]
told = []
for case in json.load(open(place + "/cases.json")):
    home = f"{place}/{case['name']}"
    sys.path.insert(0, home)
    main = importlib.import_module(case["main"])
    fronts = {
        "memoize": memoize(home + "/memoize", main.f, single_flight="off"),
        "cache_file": cache_file(home + "/cache_file")(main.f),
    }
    for front, f in fronts.items():
        for step in ("first", "again"):
            before = f.counters["hits"]
            got = f(1)
            told.append([case["name"], front, step, got == main.f(1), f.counters["hits"] > before, dict(f.counters)])
    if phase == "before" and case["change"]:
        lib = sys.modules[case["lib"]]
        exec(case["change"], {"lib": lib, "sys": sys, "os": os, "LIB": case["lib"]})
        for front, f in fronts.items():
            got = f(1)
            told.append([case["name"], front, "changed", got == main.f(1), False, dict(f.counters)])
            got = f(2)  # which is filed, in this process alone, under what has changed
            told.append([case["name"], front, "changed, other", got == main.f(2), False, dict(f.counters)])
        os.environ.pop("MEMO_KEYS_ENV", None)
    if phase == "after":
        for front, f in fronts.items():
            got = f(2)
            told.append([case["name"], front, "other", got == main.f(2), False, dict(f.counters)])
    sys.path.remove(home)
print(json.dumps(told))
"""


class Account(NamedTuple):
    """The outcome of a run.

    Attributes
    ----------
    programs : int
    calls : int
        Of memoized functions, by both front ends.
    wrong : list of str
        Each wrong hit: what was done, to which feature, by which front end.
    needless : Counter
        Calls that ran although nothing had changed that means something, by front end and what was edited.
    uncached : Counter
        Those of them that say why: counters of the engine.
    """

    programs: int
    calls: int
    wrong: list[str]
    needless: Counter[str]
    uncached: Counter[str]


def run(place: str | os.PathLike[str], programs: int, seed: int, *, every: bool = False) -> Account:
    """Make programs below a directory, run them, edit them, run them again.

    Parameters
    ----------
    place : path-like
    programs : int
        How many, of features and edits taken by chance.
    seed : int
    every : bool
        Make one more for each feature, whose value is edited.
    """
    rng = random.Random(seed)  # noqa: S311 - repeatable, nothing secret
    root = Path(place)
    cases = [
        *(_make(root, number, rng) for number in range(programs)),
        *(_make(root, programs + n, rng, name) for n, name in enumerate(sorted(FEATURES) if every else ())),
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    (root / "child.py").write_text(CHILD)
    told = _child(root, "before")
    for case in cases:
        lib = root / case["name"] / f"{case['lib']}.py"
        lib.write_text(case["after"])
    told_after = _child(root, "after")
    by_name = {case["name"]: case for case in cases}
    wrong: list[str] = []
    needless: Counter[str] = Counter()
    uncached: Counter[str] = Counter()
    for phase, said in (("before", told), ("after", told_after)):
        for name, front, step, right, hit, counters in said:
            case = by_name[name]
            what = f"{front}: {case['features']}, {case['edit']}, {phase} {step}"
            if not right:
                wrong.append(what)
            expected = step == "again" or (phase == "after" and step == "first" and case["edit"] in NEUTRAL)
            if expected and not hit:
                needless[f"{front}: {case['edit'] if step == 'first' else 'again'} ({case['features']})"] += 1
                uncached.update({kind: 1 for kind in ("uncached", "changed", "dropped") if counters.get(kind)})
    return Account(len(cases), len(told) + len(told_after), wrong, needless, uncached)


def _make(root: Path, number: int, rng: random.Random, feature: str | None = None) -> dict[str, str]:
    names = rng.sample(sorted(FEATURES), rng.choice((1, 1, 2, 3))) if feature is None else [feature]
    edited = names[0]
    lazy = FEATURES[edited].lazy
    names = [name for name in names if FEATURES[name].lazy == lazy]
    lib, main = f"lib_{number}", f"main_{number}"
    parts = [_own(FEATURES[name].source, number) for number, name in enumerate(names)]
    uses = " + ".join(f"({_own(FEATURES[name].use, i)})" for i, name in enumerate(names))
    before = "\n".join(_with(part, 1) for part in parts) + "\n"
    edit = rng.choice(["value", "value", "change", *NEUTRAL]) if feature is None else "value"
    after = before
    if edit == "value":
        after = "\n".join([_with(parts[0], 2), *(_with(part, 1) for part in parts[1:])]) + "\n"
    elif edit in NEUTRAL:
        after = NEUTRAL[edit](before)
    change = _own(FEATURES[edited].change, 0) if edit == "change" else ""
    home = root / f"case_{number}"
    home.mkdir(parents=True)
    (home / f"{lib}.py").write_text(before)
    bring = f"import {lib} as lib"
    text = _FUNCTION.format(lib=lib, head="" if lazy else bring, body=bring if lazy else "pass", uses=uses)
    (home / f"{main}.py").write_text(text)
    return {
        "name": home.name, "lib": lib, "main": main, "features": ", ".join(names), "edit": edit, "change": change,
        "after": after,
    }  # fmt: skip


def _own(text: str, number: int) -> str:
    """Give the names of a feature its number, so that two don't meet."""
    return re.sub(r"\b(_?[A-Za-z])_\b", rf"\g<1>_{number}", text)


def _with(text: str, value: int) -> str:
    return re.sub(r"@(?![A-Za-z_])", str(value), text)


def _child(root: Path, phase: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-B", str(root / "child.py"), str(root), phase],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": str(len(phase))},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[Any] = json.loads(done.stdout)
    return found
