#!/usr/bin/env python3
"""The limits that the project sets itself: python tests/limits.py. Exits with code 1 if one is exceeded.

Prints the tokens of each package, without comments and docstrings (lines would reward dense code), the longest files,
the largest classes, import circles and the median length of functions. The product is pipeline, model, train and tools;
tools/bench counts on its own.
"""

from __future__ import annotations

import ast
import collections
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("pipeline", "model", "train", "tools")
BENCHMARKS = "tools/bench"

PRODUCT_TOKENS = 118_030  # the aim is 85,000: lower this whenever the code has shrunk
BENCHMARK_TOKENS = 23_000
FILE_LINES = 300
CLASS_METHODS = 15
MEDIAN_FUNCTION_LINES = 8

NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> dict[str, str]:
    """The text of the tracked files, by their path from `root`."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if path.startswith(tuple(f"{top}/" for top in PRODUCT))]
    return {path: (root / path).read_text(encoding="utf-8") for path in paths if (root / path).is_file()}


def package(path: str) -> str:
    return BENCHMARKS if path.startswith(f"{BENCHMARKS}/") else path.split("/")[0]


def count_tokens(text: str) -> int:
    """Tokens of code: a string that is a statement of its own is a docstring."""
    count, before = 0, tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and before in NO_CODE
        count += token.type not in NO_CODE and not docstring
        before = token.type
    return count


def classes(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The number of methods of each class, properties included, and its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield sum(isinstance(item, Function) for item in node.body), f"{path}: {node.name}"


def function_lines(tree: ast.AST) -> Iterator[int]:
    """Lines of each function, from `def` to its end, docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.end_lineno:
            yield node.end_lineno - node.lineno + 1


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Our modules that this one imports outside its functions, those for the type checker alone included."""
    above = path.removesuffix(".py").split("/")[:-1]
    found: set[str] = set()
    for node in outside_functions(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = above[: len(above) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inside = {f"{name}.{alias.name}" for alias in node.names}
            found |= (inside & modules) | ({name} if inside - modules else set())
    return (found & modules) - {module(path)}


def outside_functions(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, Function):
            for name in ("body", "orelse", "finalbody"):
                yield from outside_functions(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from outside_functions(handler.body)


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Modules that import each other in a circle; `graph` loses an import of each."""
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return
        except CycleError as err:
            around = err.args[1][::-1]
        yield " → ".join(around)
        graph[around[0]].discard(around[1])


def check(files: dict[str, str]) -> tuple[list[str], list[str]]:
    """(the report, the limits that are exceeded)."""
    trees = {path: ast.parse(text) for path, text in files.items()}
    tokens: collections.Counter[str] = collections.Counter()
    for path, text in files.items():
        tokens[package(path)] += count_tokens(text)
    product = sum(tokens[top] for top in PRODUCT)
    lines = sorted(((text.count("\n"), path) for path, text in files.items()), reverse=True)
    methods = sorted((found for path, tree in trees.items() for found in classes(path, tree)), reverse=True)
    median = statistics.median(length for tree in trees.values() for length in function_lines(tree))
    modules = {module(path) for path in files}
    around = list(circles({module(path): imports(path, tree, modules) for path, tree in trees.items()}))

    report = [f"{name:12} {tokens[name]:7,} tokens" for name in (*PRODUCT, BENCHMARKS)]
    report += [
        f"{'product':12} {product:7,} tokens, of {PRODUCT_TOKENS:,} at most",
        f"longest file: {lines[0][1]}, {lines[0][0]} lines of {FILE_LINES} at most",
        f"largest class: {methods[0][1]}, {methods[0][0]} methods of {CLASS_METHODS} at most",
        f"functions: {median:g} lines, the median, of {MEDIAN_FUNCTION_LINES} at most",
        f"import circles: {'; '.join(around) or 'none'}",
    ]
    exceeded = [f"{path}: {count} lines, more than {FILE_LINES}" for count, path in lines if count > FILE_LINES]
    exceeded += [f"{name}: {n} methods, more than {CLASS_METHODS}" for n, name in methods if n > CLASS_METHODS]
    if product > PRODUCT_TOKENS:
        exceeded.append(f"product: {product:,} tokens, more than {PRODUCT_TOKENS:,}")
    if tokens[BENCHMARKS] > BENCHMARK_TOKENS:
        exceeded.append(f"{BENCHMARKS}: {tokens[BENCHMARKS]:,} tokens, more than {BENCHMARK_TOKENS:,}")
    if median > MEDIAN_FUNCTION_LINES:
        exceeded.append(f"functions: {median:g} lines, the median, more than {MEDIAN_FUNCTION_LINES}")
    return report, exceeded + [f"import circle: {modules}" for modules in around]


def main() -> None:
    report, exceeded = check(sources(ROOT))
    print("\n".join(report))
    for line in exceeded:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(bool(exceeded))


if __name__ == "__main__":
    main()
