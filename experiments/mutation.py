"""Mutation testing: one fault at a time is put into a source file; do the tests of that file fail?

    python experiments/mutation.py --output mutation.json [--only objectives heads] [--sample 300]

A fault (mutant) changes one node of the syntax tree: an operator, a comparison, a condition, a number, a truth value,
a string, or one of a few names (min for max, sum for mean …). Annotations, docstrings, imports and the texts of errors
are left alone. torch and pytest are imported once; every mutant is a fork of that process, which reads the changed
source in place of the file and runs the file's tests and doctests until the first failure. Hypothesis draws the same
examples every time and does not shrink.

A mutant is killed by a failure, an error, or by running five times as long as the tests do without it. Survivors are
listed with a reason: write it into the output, and the next run keeps it. `--sample N` takes N mutants at random
(`--seed`) where a full run takes too long. `--again` runs only the survivors in the output, after tests were added.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "poise"
WARM = ("torch", "transformers", "scipy.stats", "scipy.optimize", "sklearn.cluster", "hypothesis", "beartype", "peft")
EXTRA_TESTS = {  # besides tests/ROOM/test_NAME.py
    "reward/heads.py": ["tests/reward/test_head_training.py"],
    "functional/calibration.py": ["tests/functional/test_statistics.py"],
    "functional/reward_benchmarks.py": ["tests/functional/test_statistics.py"],
}
TARGETS = (
    *("objectives", "reward_losses", "ppo", "best_of_n", "overoptimization", "statistics", "calibration"),
    *("reward_benchmarks", "monitor", "schedules"),
)
FILES = (*(f"functional/{name}.py" for name in TARGETS), "reward/heads.py", "models/scorer.py")

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


def tests_of(file: str) -> list[str]:
    room, name = file.split("/")
    own = ROOT / "tests" / room / f"test_{name}"
    return [str(own)] * own.exists() + [str(ROOT / test) for test in EXTRA_TESTS.get(file, [])] + [str(SOURCE / file)]


def serve(file: str, source: str) -> None:
    """From now on importing `file` reads `source`."""
    target, read = str(SOURCE / file), SourceFileLoader.get_data
    sys.dont_write_bytecode = True

    def get_data(self: SourceFileLoader, path: str) -> bytes:
        if path == target:
            return source.encode()
        if path.endswith(".pyc") and Path(path).name.startswith(f"{Path(file).stem}."):
            raise OSError("the bytecode of the unchanged file")
        return read(self, path)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]


def judge(file: str, source: str | None, limit: float, log: str = os.devnull) -> tuple[str, float]:
    """("killed", "timeout" or "survived", seconds) of a forked process that runs the tests on the source."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        if source is not None:
            serve(file, source)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=mutation"]
        options += ["--noconftest"] * (not file.startswith("models/"))  # its fixtures import far more than the file
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there already
        os._exit(int(pytest.main([*options, *tests_of(file)])))
    while time.monotonic() - start < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return ("survived" if code == 0 else "killed"), time.monotonic() - start
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - start


def warm_up() -> None:
    """Import what every fork needs, but nothing of Poise; the same examples of Hypothesis in every fork."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in (*WARM, "jaxtyping", "pytest", "numpy"):
        importlib.import_module(name)
    import hypothesis
    import torch

    torch.set_num_threads(1)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    same = hypothesis.settings(deadline=None, database=None, derandomize=True, phases=phases)
    hypothesis.settings.register_profile("mutation", same)


# ---- the run ----


def report(verdicts: list[dict], reasons: dict[str, str], settings: dict) -> dict:
    files = {}
    for file in dict.fromkeys(verdict["file"] for verdict in verdicts):
        counts = Counter(verdict["verdict"] for verdict in verdicts if verdict["file"] == file)
        killed = counts["killed"] + counts["timeout"]
        files[file] = {"mutants": counts.total(), "killed": killed, "share": round(killed / counts.total(), 4)}
    total = {key: sum(entry[key] for entry in files.values()) for key in ("mutants", "killed")}
    survivors = [
        {"label": verdict["label"], "line": verdict["line"], "reason": reasons.get(verdict["label"], "")}
        for verdict in verdicts
        if verdict["verdict"] == "survived"
    ]
    share = round(total["killed"] / total["mutants"], 4)
    return {"settings": settings, "total": {**total, "share": share}, "files": files, "survivors": survivors}


def merged(kept: dict, new: dict) -> dict:
    """A report with the files of an earlier one that were not run again."""
    files = kept.get("files", {}) | new["files"]
    total = {key: sum(entry[key] for entry in files.values()) for key in ("mutants", "killed")}
    others = [one for one in kept["survivors"] if one["label"].split(": ")[0] not in new["files"]]
    return {
        **new, "total": {**total, "share": round(total["killed"] / total["mutants"], 4)}, "files": files,
        "survivors": others + new["survivors"],
    }  # fmt: skip


def again(output: Path) -> None:
    """Judge the survivors of an earlier run by the tests of today."""
    kept = json.loads(output.read_text())
    warm_up()
    left = []
    for survivor in kept["survivors"]:
        file = survivor["label"].split(": ")[0]
        mutant = next((one for one in mutants(file) if one.label == survivor["label"]), None)
        if mutant is None:
            raise SystemExit(f"{file} has changed: {survivor['label']}")
        if judge(file, mutant.source, 200.0)[0] == "survived":
            left.append(survivor)
            print(f"  {mutant.line}: {mutant.within}: {mutant.before}  ->  {mutant.after}", flush=True)
            continue
        for entry in (kept["files"][file], kept["total"]):
            entry["killed"] += 1
            entry["share"] = round(entry["killed"] / entry["mutants"], 4)
    kept["survivors"] = left
    output.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


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
        again(Path(options.output))
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
        verdict, base = judge(file, None, 600.0, f"{output}.log")
        if verdict != "survived":
            raise SystemExit(f"{file}: the tests fail without a fault; see {output}.log")
        for mutant in found:
            verdict, _ = judge(file, mutant.source, max(20.0, 5 * base))
            verdicts.append({"file": file, "label": mutant.label, "line": mutant.line, "verdict": verdict})
            if verdict == "survived":
                print(f"  {mutant.line}: {mutant.within}: {mutant.before}  ->  {mutant.after}", flush=True)
        print(f"  {base:.1f} s unchanged, {time.monotonic() - started:.0f} s so far", flush=True)
        settings = {"sample": options.sample, "seed": options.seed, "seconds": round(time.monotonic() - started)}
        found_now = merged(kept, report(verdicts, reasons, settings))
        output.write_text(json.dumps(found_now, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
