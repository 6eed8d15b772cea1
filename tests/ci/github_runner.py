# SPDX-License-Identifier: Apache-2.0
"""A stand-in for GitHub's runner, in which the steps of our workflows run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys


class Runner:
    """GitHub's runner, so far as our workflows ask of it.

    ``store`` is where its cache action keeps files, ``checkout(folder)`` puts the project's files there, and ``tools``
    is a folder with stand-ins for programs that a runner has.
    """

    def __init__(self, workflow, store, checkout, tools=None):
        (self.work,) = workflow["jobs"].values()
        self.store, self.checkout, self.tools = store, checkout, tools

    def job(self, folder, *, run_id, **context):
        """Do the job in a fresh checkout; the outcome of each step by name."""
        folder.mkdir()
        self.folder = folder
        self.context = {"github.run_id": str(run_id), "runner.os": "Linux", "runner.arch": "X64", **context}
        self.env = {}
        for name, value in self.work["env"].items():
            self.env[name] = self.context[f"env.{name}"] = self.filled(value)
        outcomes, failed = {}, False
        for step in self.work["steps"]:
            name = step.get("name", step.get("uses"))
            if not self.value(step.get("if", "true")) or (failed and "always()" not in step.get("if", "")):
                outcomes[name] = "skipped"
                continue
            done = self.uses(step) if "uses" in step else self.run(step["run"], step.get("env", {}))
            outcomes[name] = "success" if done else "failure"
            failed = failed or not (done or step.get("continue-on-error"))
        return outcomes

    def run(self, script, more):
        path = os.pathsep.join(filter(None, (self.tools, os.path.dirname(sys.executable), os.environ["PATH"])))
        lighter = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "0", "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
        own = {name: self.filled(value) for name, value in more.items()}
        summary = {"GITHUB_STEP_SUMMARY": str(self.folder / "summary.md")}
        env = {**os.environ, **self.env, **own, **lighter, **summary, "PATH": path}
        command = ["bash", "-e", "-c", self.filled(script)]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        return done.returncode == 0

    def uses(self, step):
        action, given = step["uses"].partition("@")[0], {k: self.filled(v) for k, v in step.get("with", {}).items()}
        if action == "actions/checkout":
            self.checkout(self.folder)
        elif action == "actions/cache/save":
            shutil.copy(self.folder / given["path"], self.store / given["key"])
        elif action == "actions/cache/restore":
            kept = sorted(self.store.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            found = [path for path in kept if path.name.startswith((given["key"], given["restore-keys"]))]
            self.context[f"steps.{step['id']}.outputs.cache-matched-key"] = found[0].name if found else ""
            if found:
                shutil.copy(found[0], self.folder / given["path"])
        else:
            assert action in {"actions/setup-python", "actions/upload-artifact"}
        return True

    def filled(self, text):
        return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(self.value(match[1].strip())), str(text))

    def value(self, expression):
        """What an expression of a workflow comes to, of the few operators that this one has."""
        python = str(expression).replace("&&", " and ").replace("||", " or ").replace("always()", "True")
        python = re.sub(r"\btrue\b", "True", python)
        named = re.sub(r"(?<!')\b[a-z]+(?:\.[\w-]+)+", lambda match: f"of({match[0]!r})", python)
        return eval(named, {"of": lambda name: self.context.get(name, "")})
