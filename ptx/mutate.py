"""The mutation test: would the test suite notice if one instruction of a kernel were wrong?

    python -m ptx.mutate [--op OP] [--kernel NAME] [--kind KIND] [--limit 3] [--seed 0] [-j 1]
    python -m ptx.mutate --json FILE --resume    goes on where an earlier run was cut short

It takes the tests of an op (tests/ptx/test_OP_*.py), or of all, notes which of its kernels each of
them launches, changes one instruction of a kernel (mutations.py) and runs the tests that launch it
until one fails. A mutant that none notices has survived. Survivors that compute the same, or as
well, are explained in mutants.json (explained.py); any other makes the command fail: a test is
missing.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from _pytest.runner import runtestprotocol
from tabulate import tabulate
from tqdm import tqdm

from ptx import build, cache, children, explained
from ptx.cache import ROOT, digest
from ptx.executor import Executor, Launch, readable
from ptx.mutations import Mutant, mutants

TESTS = ROOT / "tests" / "ptx"
# Of the instances of a CUDA kernel that differ in their dtypes alone one is mutated, where there is
# one this; all template shapes are.
DTYPE = "__nv_bfloat16"
_DTYPES = re.compile(rf"\b({DTYPE}|__half|float)\b")
BASELINE_SECONDS = 600  # of its processor, for one test
SLACK = 20  # seconds of its processor, beside 5 times what a test takes without the mutant


@dataclass
class Kernel:
    """Texts that differ in their target alone, such as those of sm_80 and sm_90a."""

    op: str
    name: str  # "forward_rows_kernel<__nv_bfloat16, 8, 16>"
    texts: list[str]
    tests: list[str] = field(default_factory=list)  # node ids, the quickest first


Task = tuple[tuple[Kernel, Mutant], Callable[[], Any], int]


@dataclass(frozen=True)
class Verdict:
    kernel: Kernel
    mutant: Mutant
    how: str  # "report", "test", "hang", "crash"; "survived", "explained"
    test: str = ""

    @property
    def caught(self) -> bool:
        return self.how not in ("survived", "explained")


# ---- in a child --------------------------------------------------------------------------------
def _run_test(item: pytest.Item) -> str:
    """What pytest says of the failure; nothing where the test passes."""
    for report in runtestprotocol(item, log=False, nextitem=None):
        if report.failed:
            return report.longreprtext
    return ""


def _baseline(item: pytest.Item) -> dict[str, Any]:
    """Runs one test as it stands: how it went, and how often it launched each kernel's library."""
    launches: Counter[str] = Counter()
    libraries: dict[int, str] = {}  # by the executor's number of the kernel
    load, launch = Executor.load, Executor.launch

    def noting(executor: Executor, library: Path) -> dict[str, int]:
        kernels = load(executor, library)
        libraries.update(dict.fromkeys(kernels.values(), str(library)))
        return kernels

    def counting(executor: Executor, kernel: int, *arguments: Any) -> Launch:
        launches[libraries[kernel]] += 1
        return launch(executor, kernel, *arguments)

    start = time.process_time()
    with patch.object(Executor, "load", noting), patch.object(Executor, "launch", counting):
        failure = _run_test(item)
    return {"failure": failure, "seconds": time.process_time() - start, "launches": launches}


def _try(
    kernel: Kernel, mutant: Mutant, tests: Sequence[tuple[pytest.Item, int]], folder: Path
) -> tuple[str, str]:
    """How a mutant is caught and by which test; ("survived", "") where all tests pass.

    `tests` come with the seconds that they may take, `folder` is where the mutant is built.
    """
    library = build.kernel_library
    substituted = False

    def substituting(ptx: str) -> Path:
        nonlocal substituted
        if ptx not in kernel.texts:
            return library(ptx)
        substituted = True
        with patch.object(cache, "CACHE", folder):
            return library(mutant.applied(ptx))

    build.kernel_library = substituting
    for item, seconds in tests:
        children.limit(seconds)
        if failure := _run_test(item):
            return "report" if "KernelError" in failure else "test", item.nodeid
    if not substituted:
        raise RuntimeError("no test ran the mutant: the kernel's text is not what was noted of it")
    return "survived", ""


# ---- in the parent -------------------------------------------------------------------------------
class Plugin:
    """Takes the place of pytest's own loop over the tests it has collected."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.verdicts: list[Verdict] = []
        self.failures: list[str] = []  # tests that fail without any mutant
        self.state = ""  # of all that a verdict depends on

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        kernels, seconds = self._kernels(items)
        if not self.failures:
            self._mutate(kernels, items, seconds)
        return True

    def _kernels(self, items: dict[str, pytest.Item]) -> tuple[list[Kernel], dict[str, float]]:
        found = self._baselines(items)
        texts: dict[str, Counter[str]] = defaultdict(Counter)  # PTX -> launches by each test
        for name, baseline in found.items():
            for library, launches in baseline["launches"].items():
                texts[(Path(library).parent / "kernel.ptx").read_text()][name] += launches
        seconds = {name: baseline["seconds"] for name, baseline in found.items()}
        wanted = ops() if self.options.op == "all" else [self.options.op]
        kernels = _grouped(texts, seconds)
        return [k for k in kernels if k.op in wanted and self.options.kernel in k.name], seconds

    def _baselines(self, items: dict[str, pytest.Item]) -> dict[str, Any]:
        """Of every test, kept until a file changes that it may depend on."""
        folders = ("csrc", "kernels", "ptx", "tests")
        files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")))
        sources = [path for path in files if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")]
        self.state = digest(str(ROOT), *items, *sources)  # PTX names the files it comes from
        kept = cache.CACHE / f"baseline-{self.state}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        tasks = [
            (name, lambda item=item: _baseline(item), BASELINE_SECONDS)
            for name, item in items.items()
        ]
        found: dict[str, Any] = {}
        outcomes = children.run(tasks, self.options.j)
        for name, outcome in tqdm(outcomes, "tests without mutants", len(tasks), leave=False):
            if outcome.failure or outcome.value["failure"]:
                self.failures.append(f"{name}: {outcome.failure or outcome.value['failure']}")
            else:
                found[name] = outcome.value
        if not self.failures:
            kept.write_text(json.dumps(found))
        return found

    def _mutate(
        self, kernels: list[Kernel], items: dict[str, pytest.Item], seconds: dict[str, float]
    ) -> None:
        entries = explained.entries()
        judged = self._judged()
        chosen = []
        for kernel in kernels:
            for mutant in _chosen(kernel, self.options):
                if verdict := judged.get((kernel.name, mutant.line, mutant.becomes)):
                    self.verdicts.append(Verdict(kernel, mutant, *verdict))
                else:
                    chosen.append((kernel, mutant))
        limits = {name: int(SLACK + 5 * seconds[name]) for name in seconds}
        built = tempfile.TemporaryDirectory()

        def task(kernel: Kernel, mutant: Mutant) -> Task:
            tests = [(items[name], limits[name]) for name in kernel.tests]
            return (kernel, mutant), lambda: _try(kernel, mutant, tests, Path(built.name)), 0

        tasks = [task(kernel, mutant) for kernel, mutant in chosen]
        outcomes = children.run(tasks, self.options.j)
        for (kernel, mutant), outcome in tqdm(outcomes, "mutants", len(tasks), leave=False):
            how, test = outcome.value or (outcome.failure.split("\n")[0], "")
            if outcome.failure not in ("", "hang", "crash"):
                raise RuntimeError(f"{kernel.name}: {mutant}\n{outcome.failure}")
            self._keep(Verdict(kernel, mutant, how, test))
        built.cleanup()
        self.verdicts = [_explained(verdict, entries) for verdict in self.verdicts]

    def _keep(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if self.options.json:
            row = {
                "op": verdict.kernel.op,
                "kernel": verdict.kernel.name,
                "how": verdict.how,
                "test": verdict.test,
                "state": self.state,
            }
            with self.options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | vars(verdict.mutant)) + "\n")

    def _judged(self) -> dict[tuple[str, int, str], tuple[str, str]]:
        """How and by which test, from the file of verdicts: those of the very same sources."""
        if not self.options.resume:
            return {}
        lines = self.options.json.read_text(encoding="utf-8").splitlines()
        return {
            (row["kernel"], row["line"], row["becomes"]): (row["how"], row["test"])
            for row in map(json.loads, lines)
            if row["state"] == self.state
        }


def ops() -> list[str]:
    """Those that have tests to try."""
    folders = sorted(path.name for path in (ROOT / "kernels").iterdir() if path.is_dir())
    return [name for name in folders if op_tests(name)]


def op_tests(op: str) -> list[Path]:
    return sorted(TESTS.glob(f"test_{op}_*.py"))


def _body(ptx: str) -> str:
    """A kernel without what names its target."""
    return re.sub(r"^(\.version|\.target|//).*$", "", ptx, flags=re.MULTILINE)


def _op(ptx: str) -> str:
    """The op whose folder a kernel's source lies in; nothing for a kernel of a test.

    In whichever clone of the project: Triton takes a kernel from its cache that was compiled there.
    """
    found = re.search(r'"/[^"]*/(?:csrc|kernels)/(\w+)/(?<!/common/)', ptx)
    return found[1] if found else ""


def _name(ptx: str) -> str:
    """Of a Triton kernel code with vectors and code without have names of their own."""
    name = readable(re.findall(r"\.entry\s+([\w$]+)", ptx)[0])
    if "::" not in name:
        return name + ("<vectors>" if re.search(r"ld\.global\S*\.v[24]", ptx) else "<elements>")
    return re.sub(r"\b\w+::", "", name)


def _grouped(texts: dict[str, Counter[str]], seconds: dict[str, float]) -> list[Kernel]:
    """The kernels to mutate. Of the texts of one kernel those launched most often are taken, which
    the sweeps of sizes are made of: code for one architecture and one dtype, or of a Triton kernel
    one specialisation with vectors and one without.
    """
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for ptx in texts:
        groups[_op(ptx), _name(ptx), digest(_body(ptx))].append(ptx)
    best: dict[tuple[str, str], tuple[tuple[bool, int], Kernel]] = {}
    for (op, name, _), alike in groups.items():
        launches = sum((texts[ptx] for ptx in alike), Counter())
        rank = DTYPE in name, sum(launches.values())
        key = op, _DTYPES.sub("T", name)
        if key not in best or rank > best[key][0]:
            quickest_first = sorted(launches, key=lambda test: seconds[test])
            best[key] = rank, Kernel(op, name, sorted(alike), quickest_first)
    return [kernel for _, (_, kernel) in sorted(best.items())]


def _chosen(kernel: Kernel, options: argparse.Namespace) -> list[Mutant]:
    """At most `limit` mutants of each kind, always the same ones for the same text and seed."""
    by_kind: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants(kernel.texts[0]):
        by_kind[mutant.kind].append(mutant)
    # Lines of different targets agree, or the texts would not have been grouped.
    numbers = random.Random(f"{options.seed} {kernel.name}")
    return [
        mutant
        for kind in sorted(by_kind)
        for mutant in numbers.sample(by_kind[kind], min(options.limit, len(by_kind[kind])))
        if options.kind in kind
    ]


def _explained(verdict: Verdict, entries: list[explained.Entry]) -> Verdict:
    mutant, name = verdict.mutant, verdict.kernel.name
    if verdict.how == "survived" and any(explained.explains(e, name, mutant) for e in entries):
        return replace(verdict, how="explained")
    return verdict


# ---- the report ----------------------------------------------------------------------------------
def _table(verdicts: list[Verdict], key: Callable[[Verdict], str], title: str) -> str:
    columns = ("report", "test", "hang", "crash", "explained", "survived")
    count: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        count[key(verdict)][verdict.how] += 1
        count["all"][verdict.how] += 1
    rows = []
    for name in [*sorted(count.keys() - {"all"}), "all"]:
        total = sum(count[name].values())
        judged = total - count[name]["explained"]
        caught = judged - count[name]["survived"]
        share = f"{100 * caught / judged:.0f} %" if judged else ""
        rows.append([name, f"{caught}/{judged}", share, *(count[name][c] or "" for c in columns)])
    return tabulate(rows, headers=[title, "caught", "", *columns])


def _report(verdicts: list[Verdict]) -> Iterator[str]:
    yield _table(verdicts, lambda v: f"{v.kernel.op} {v.kernel.name}", "kernel")
    yield _table(verdicts, lambda v: v.mutant.kind, "kind")
    for verdict in verdicts:
        if verdict.how == "survived":
            where = f"{verdict.kernel.op} {verdict.kernel.name}, PTX line {verdict.mutant.line}"
            yield f"SURVIVED  {where}: {verdict.mutant}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.mutate", description=__doc__)
    parser.add_argument("--op", default="all", choices=[*ops(), "all"])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--kind", default="", help="only mutants whose kind contains this")
    parser.add_argument("--limit", type=int, default=3, help="mutants of a kind and kernel")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are chosen")
    parser.add_argument("-j", type=int, default=1, help="how many to try at a time")
    parser.add_argument("--tests", nargs="+", type=Path, help="files of tests to try instead")
    parser.add_argument("--json", type=Path, help="append every verdict to this file")
    parser.add_argument("--resume", action="store_true", help="take the verdicts that it holds")
    options = parser.parse_args()
    if options.resume and not (options.json and options.json.exists()):
        parser.error("--resume needs the file of an earlier run's verdicts: --json FILE")
    plugin = Plugin(options)
    tests = [test for op in ops() if options.op in (op, "all") for test in op_tests(op)]
    arguments = [str(ROOT / test) for test in options.tests or tests]
    arguments += ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--capture=no", "--no-header"]
    code = pytest.main([*arguments, f"--rootdir={ROOT}"], plugins=[plugin])
    for failure in plugin.failures:
        print(f"FAILED WITHOUT A MUTANT  {failure}", file=sys.stderr)
    if code or plugin.failures:
        return 2
    print(*_report(plugin.verdicts), sep="\n\n")
    return int(any(verdict.how == "survived" for verdict in plugin.verdicts))


if __name__ == "__main__":
    sys.exit(main())
