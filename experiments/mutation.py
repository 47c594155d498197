"""Mutation testing: one fault at a time is put into a source file; do the tests of that file fail?

    python experiments/mutation.py --output mutation.json [--only objectives heads] [--sample 300]

A fault (mutant) changes one node of the syntax tree: an operator, a comparison, a condition, a number, a truth value,
a string, or one of a few names (min for max, sum for mean …). Annotations, docstrings, imports and the texts of errors
are left alone. Libraries are imported once, and for each file every module of Poise that does not import it. Every
mutant is a fork of that process, which reads the changed source in place of the file and runs the file's tests and
doctests until the first failure. Hypothesis draws the same examples every time and does not shrink.

A mutant is killed by a failure, an error, or by five times the processor time that the tests take without it. Survivors
are listed with a reason: write it into the output, and the next run keeps it. `--sample N` takes N mutants of each file
at random (`--seed`) where a full run takes too long; the interval of the share killed is Wilson's, 95 %. `--again` runs
only the survivors in the output, after tests were added.
"""

import argparse
import ast
import contextlib
import copy
import functools
import gc
import importlib
import json
import math
import os
import pickle
import random
import resource
import shlex
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "poise"
WARM = ("before_poise", "hypothesis", "jaxtyping", "numpy", "peft", "pytest", "scipy.optimize", "sklearn.cluster")
WARM += ("sklearn.covariance", "sklearn.linear_model", "trl")
EXTRA_TESTS = {  # besides tests/ROOM/test_NAME.py
    "reward/heads.py": ["tests/reward/test_head_training.py"],
    "functional/calibration.py": ["tests/functional/test_statistics.py"],
    "functional/reward_benchmarks.py": ["tests/functional/test_statistics.py"],
    "functional/best_of_n.py": ["tests/functional/test_overoptimization.py"],
    "functional/head_rewards.py": ["tests/functional/test_typicality.py", "tests/functional/test_objectives.py"],
    "functional/objective_names.py": ["tests/functional/test_objectives.py"],
    "functional/reward_scale.py": ["tests/functional/test_objectives.py", "tests/functional/test_typicality.py"],
    "models/drawing.py": ["tests/models/test_policy.py"],
}
# A reward model is trained for each of three architectures; one of them shows nearly every fault.
NARROWED = {f"models/{name}.py": ["-k", "not qwen3 and not gpt2"] for name in ("scorer", "drawing")}
TARGETS = (
    *("objectives", "objective_names", "head_rewards", "reward_losses", "ppo", "best_of_n", "overoptimization"),
    *("statistics", "calibration", "reward_benchmarks", "monitor", "schedules", "typicality", "choice", "trust"),
    *("shaping", "shapes", "reward_scale", "memory"),
)
FILES = (*(f"functional/{name}.py" for name in TARGETS), "reward/heads.py", "policy/update.py")
FILES += ("models/scorer.py", "models/encoding.py", "models/padding.py", "models/drawing.py")

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_PAIRS = (
    ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("clamp_min", "clamp_max"), ("minimum", "maximum"),
    ("sum", "mean"), ("any", "all"), ("floor", "ceil"), ("exp", "log"), ("zeros", "ones"), ("unsqueeze", "squeeze"),
)  # fmt: skip
NAMES = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


class Mutant(NamedTuple):
    """One fault. before, after: the statement or expression that differs."""

    file: str
    line: int
    within: str
    before: str
    after: str
    source: str

    @property
    def label(self) -> str:
        return f"{self.file}: {self.within}: {self.before} -> {self.after}"


# ---- faults ----


def changes(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    """What may be changed at a node, each as a function that does it in place."""

    def put(**fields: object) -> Callable[[ast.AST], None]:
        return lambda target: [setattr(target, name, value) for name, value in fields.items()] and None

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        yield put(op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield put(ops=[SWAPS[type(node.ops[0])]()])
        opposite = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}.get(type(node.ops[0]))
        if opposite:
            yield put(ops=[opposite()])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in SWAPS:
                yield put(ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        if not (isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)):
            yield put(op=ast.UAdd()) if isinstance(node.op, ast.USub) else put(op=ast.Not(), operand=_negated(node))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield put(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield put(value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield put(value=f"x{node.value}")
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield put(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield put(attr=NAMES[node.attr])
    elif (
        isinstance(node, ast.Name) and node.id in ("min", "max", "any", "all", "sum") and isinstance(node.ctx, ast.Load)
    ):
        yield put(id={"sum": "max"}.get(node.id, NAMES[node.id]))
    elif isinstance(node, ast.Break):
        yield lambda _: None  # done by `replaced`, a statement has no field to change


def _negated(node: ast.UnaryOp) -> ast.expr:
    """For `not x` and `~x`: what `not` must stand before to undo it."""
    return ast.UnaryOp(ast.Not(), node.operand) if isinstance(node.op, ast.Not) else node


def mutants(file: str) -> list[Mutant]:
    """Every fault of a file, in its order."""
    text = (SOURCE / file).read_text()
    tree = ast.parse(text)
    found = []
    for path, within, statement in _places(tree):
        node = _at(tree, path)
        for change in changes(node):
            changed = copy.deepcopy(tree)
            change(_at(changed, path))
            if isinstance(node, ast.Break):
                continue
            source = ast.unparse(ast.fix_missing_locations(changed))
            shown = [ast.unparse(_head(_at(one, statement))) for one in (tree, changed)]
            if shown[0] != shown[1]:
                found.append(Mutant(file, getattr(node, "lineno", 0), within, *shown, source))
    return found


Path_ = tuple[tuple[str, int | None], ...]


def _at(tree: ast.AST, path: Path_) -> ast.AST:
    for field, index in path:
        value = getattr(tree, field)
        tree = value if index is None else value[index]
    return tree


def _head(node: ast.AST) -> ast.AST:
    """A statement without the block that it heads, to be shown."""
    if hasattr(node, "body") and isinstance(node.body, list):
        node = copy.copy(node)
        node.body = [ast.Expr(ast.Constant(...))]
        for rest in ("orelse", "finalbody", "handlers", "decorator_list"):
            if getattr(node, rest, None):
                setattr(node, rest, [])
    return node


SKIPPED = {"annotation", "returns", "type_comment", "decorator_list", "type_params"}


def _places(tree: ast.AST) -> Iterator[tuple[Path_, str, Path_]]:
    """(path of a node, the function or class it is in, path of its statement), without what is left alone."""

    def walk(node: ast.AST, path: Path_, within: str, statement: Path_) -> Iterator[tuple[Path_, str, Path_]]:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if _is_type(node):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            within = f"{within}.{node.name}".lstrip(".")
        if isinstance(node, ast.stmt):
            statement = path
        yield path, within or "module", statement
        for field, value in ast.iter_fields(node):
            if field in SKIPPED:
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield from walk(child, (*path, (field, index)), within, statement)

    yield from walk(tree, (), "", ())


def _is_type(node: ast.AST) -> bool:
    """Is it `Name = Literal[...]`, `Float[...]` or `Callable[...]`?"""
    types = ("Literal", "Callable", "Float", "Int", "Bool", "TypeVar", "cast")
    return (
        isinstance(node, ast.Subscript | ast.Call) and ast.unparse(getattr(node, "value", None) or node.func) in types
    )


# ---- one mutant ----

NOT_SERVED = 99  # exit status of tests that never imported the changed source


class Quickest:
    """A plugin: tests in the order of the time that they took before, so that most faults are found at once.

    It also keeps pytest from rewriting assertions in Poise: pytest would read the file itself, and not what is served.
    """

    seconds: ClassVar[dict[str, float]] = {}  # by test; empty before the first run

    def __init__(self, kept: Path | None):
        self.kept = kept

    def pytest_configure(self) -> None:
        rewriting: Any = next(one for one in sys.meta_path if type(one).__name__ == "AssertionRewritingHook")
        find = rewriting.find_spec
        rewriting.find_spec = lambda name, *rest: None if name.split(".")[0] == "poise" else find(name, *rest)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        if self.kept is not None:
            self.kept.write_text(json.dumps(self.seconds))


def tests_of(file: str) -> list[str]:
    room, name = file.split("/")
    own = ROOT / "tests" / room / f"test_{name}"
    return [str(own)] * own.exists() + [str(ROOT / test) for test in EXTRA_TESTS.get(file, [])] + [str(SOURCE / file)]


def serve(file: str, source: str) -> list[str]:
    """From now on importing `file` reads `source`. The list returned is empty until that happens."""
    target, read = str(SOURCE / file), SourceFileLoader.get_data
    served: list[str] = []
    sys.dont_write_bytecode = True

    def get_data(self: SourceFileLoader, path: str) -> bytes:
        if path == target:
            served.append(path)
            return source.encode()
        if path.endswith(".pyc") and Path(path).name.startswith(f"{Path(file).stem}."):
            raise OSError("the bytecode of the unchanged file")
        return read(self, path)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    return served


def judge(
    file: str, source: str | None, limit: float, log: str = os.devnull, kept: Path | None = None
) -> tuple[str, float]:
    """("killed", "timeout" or "survived", seconds of processor) of a fork that runs the tests on the source.

    limit: seconds of processor after which it is ended; ten times as many on the clock end it, too.
    """
    start, before = time.monotonic(), _seconds_of_children()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
        _say_to(log)
        served = [file] if source is None else serve(file, source)
        code = run_tests(file, kept=kept)
        os._exit(code if served else NOT_SERVED)
    status = None
    while time.monotonic() - start < 10 * limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    seconds = _seconds_of_children() - before
    code = None if status is None else os.waitstatus_to_exitcode(status)
    if code == NOT_SERVED:
        raise SystemExit(f"the tests of {file} do not read it")
    if code == 0:
        return "survived", seconds
    return ("timeout" if code is None or code in (-signal.SIGXCPU, -signal.SIGKILL) else "killed"), seconds


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say_to(log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def run_tests(file: str, *more: str, kept: Path | None = None) -> int:
    """The exit status of pytest on the tests of a file, in this process. kept: where their seconds are written."""
    import pytest

    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    plain = [option for option in shlex.split(configured) if not option.startswith("--jaxtyping")]  # see `warm_up`
    options = ["-o", f"addopts={shlex.join(plain)}", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--hypothesis-profile=mutation"]
    options += ["--noconftest"] * (not file.startswith("models/"))  # its fixtures import far more than the file
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there already
    return int(pytest.main([*options, *more, *NARROWED.get(file, []), *tests_of(file)], plugins=[Quickest(kept)]))


def warm_up() -> None:
    """Import libraries, but nothing of Poise; check its shapes as the tests do; the same examples in every fork."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    for name in WARM:
        importlib.import_module(name)
    import hypothesis
    import jaxtyping
    import torch

    torch.set_num_threads(1)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    same = hypothesis.settings(deadline=None, database=None, derandomize=True, phases=phases, max_examples=40)
    hypothesis.settings.register_profile("mutation", same)
    jaxtyping.install_import_hook("poise", "beartype.beartype")


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            found = pickle.dumps(work())
        except BaseException as error:  # noqa: BLE001  the parent raises it
            found = pickle.dumps(SystemExit(repr(error)))
        with os.fdopen(writer, "wb") as file:
            file.write(found)
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        found = pickle.loads(file.read())
    os.waitpid(child, 0)
    if isinstance(found, SystemExit):
        raise found
    return found


def warm_up_for(file: str) -> None:
    """Import every module of Poise that the tests of a file import, but the file and what imports it."""

    def imported() -> list[str]:
        _say_to(os.devnull)
        run_tests(file, "--collect-only")
        return sorted(name for name in sys.modules if name.split(".")[0] == "poise")

    changed = _module(SOURCE / file)
    needs = {_module(path): _imports(path) for path in SOURCE.rglob("*.py")}
    affected = {changed}
    while more := {name for name, others in needs.items() if others & affected} - affected:
        affected |= more
    for name in in_fork(imported):
        if name not in affected:
            importlib.import_module(name)
    if changed in sys.modules:
        raise SystemExit(f"{changed} was imported before it was changed")
    gc.collect()
    gc.freeze()  # a collection in a fork would read, and so copy, all that is shared with this process


def _module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Modules of Poise that a file imports when it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] == "poise"}


# ---- the run ----


def report(verdicts: list[dict], reasons: dict[str, str], settings: dict) -> dict:
    files = {}
    for file in dict.fromkeys(verdict["file"] for verdict in verdicts):
        counts = Counter(verdict["verdict"] for verdict in verdicts if verdict["file"] == file)
        killed = counts["killed"] + counts["timeout"]
        possible = len(mutants(file))
        files[file] = {
            "mutants": counts.total(), "of": possible, "killed": killed, "share": round(killed / counts.total(), 4),
            "interval": wilson(killed, counts.total()) if counts.total() < possible else None,
        }  # fmt: skip
    total = {key: sum(entry[key] for entry in files.values()) for key in ("mutants", "killed")}
    survivors = [
        {"label": verdict["label"], "line": verdict["line"], "reason": reasons.get(verdict["label"], "")}
        for verdict in verdicts
        if verdict["verdict"] == "survived"
    ]
    share = round(total["killed"] / total["mutants"], 4)
    return {"settings": settings, "total": {**total, "share": share}, "files": files, "survivors": survivors}


def wilson(killed: int, count: int) -> list[float]:
    """95 % interval of the share that would be killed of all mutants of a file, from a sample."""
    from scipy.stats import binomtest

    return [round(float(end), 4) for end in binomtest(killed, count).proportion_ci(method="wilson")]


def merged(kept: dict, new: dict) -> dict:
    """A report with the files of an earlier one that were not run again."""
    files = kept.get("files", {}) | new["files"]
    total = {key: sum(entry[key] for entry in files.values()) for key in ("mutants", "killed")}
    others = [one for one in kept["survivors"] if one["label"].split(": ")[0] not in new["files"]]
    return {
        **new, "total": {**total, "share": round(total["killed"] / total["mutants"], 4)}, "files": files,
        "survivors": others + new["survivors"],
    }  # fmt: skip


def again(output: Path, only: list[str]) -> None:
    """Judge the survivors of an earlier run by the tests of today."""
    kept = json.loads(output.read_text())
    warm_up()
    left = []
    for file in dict.fromkeys(survivor["label"].split(": ")[0] for survivor in kept["survivors"]):
        listed = [survivor for survivor in kept["survivors"] if survivor["label"].startswith(f"{file}: ")]
        if only and Path(file).stem not in only:
            left += listed
            continue
        by_label = {mutant.label: mutant for mutant in mutants(file)}
        gone = [survivor["label"] for survivor in listed if survivor["label"] not in by_label]
        if gone:
            raise SystemExit(f"{file} has changed: {gone[0]}")
        found = in_fork(functools.partial(judge_all, file, [by_label[survivor["label"]] for survivor in listed]))
        for survivor, verdict in zip(listed, found, strict=True):
            if verdict["verdict"] == "survived":
                left.append(survivor)
                continue
            for entry in (kept["files"][file], kept["total"]):
                entry["killed"] += 1
                entry["share"] = round(entry["killed"] / entry["mutants"], 4)
        entry = kept["files"][file]
        if entry.get("interval"):
            entry["interval"] = wilson(entry["killed"], entry["mutants"])
    kept["survivors"] = left
    output.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def judge_all(file: str, found: list[Mutant]) -> list[dict]:
    """A verdict on each mutant of a file. SystemExit if its tests fail without a fault."""
    warm_up_for(file)
    log = f"/tmp/mutation-{os.getpid()}.log"
    kept = Path(f"{log}.json")
    verdict, base = judge(file, None, 600.0, log, kept)
    if verdict != "survived":
        raise SystemExit(f"{file}: the tests fail without a fault; see {log}")
    if not file.startswith("models/"):  # there a model is trained once for all tests that stand together
        Quickest.seconds.update(json.loads(kept.read_text()))
    Path(log).unlink()
    kept.unlink()
    started, verdicts = time.monotonic(), []
    for mutant in found:
        verdict, _ = judge(file, mutant.source, max(10.0, 5 * base))
        verdicts.append({"file": file, "label": mutant.label, "line": mutant.line, "verdict": verdict})
        where = f"  {mutant.line}: {mutant.within}: {mutant.before}  ->  {mutant.after}"
        print(where if verdict == "survived" else f"  {verdict}", flush=True)
    print(f"  {base:.1f} s of processor unchanged, {time.monotonic() - started:.0f} s for all", flush=True)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", nargs="+", default=[], help="names of files, e.g. objectives heads; default: all")
    parser.add_argument("--sample", type=int, default=0, help="mutants to take of every file; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="count the mutants and stop")
    parser.add_argument("--again", action="store_true", help="only the survivors that the output lists")
    options = parser.parse_args()
    if options.again:
        again(Path(options.output), options.only)
        return
    files = [file for file in FILES if not options.only or Path(file).stem in options.only]
    output = Path(options.output)
    kept = json.loads(output.read_text()) if output.exists() else {"survivors": []}
    reasons = {survivor["label"]: survivor["reason"] for survivor in kept["survivors"]}
    if not options.list:
        warm_up()
    verdicts: list[dict] = []
    started = time.monotonic()
    for file in files:
        found = mutants(file)
        if options.sample and len(found) > options.sample:
            found = random.Random(options.seed).sample(found, options.sample)
        print(f"{file}: {len(found)} mutants", flush=True)
        if options.list:
            continue
        verdicts += in_fork(functools.partial(judge_all, file, found))
        settings = {"sample": options.sample, "seed": options.seed, "seconds": round(time.monotonic() - started)}
        found_now = merged(kept, report(verdicts, reasons, settings))
        output.write_text(json.dumps(found_now, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
