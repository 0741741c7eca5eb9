"""`python -m benchmarks NAME [options]`: run one benchmark, which writes benchmarks/results/NAME.json."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def summaries() -> dict[str, str]:
    """First line of each benchmark's docstring, by name; modules with a `main` and no leading underscore."""
    found = {}
    for path in sorted(HERE.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    """Hand the options over to the benchmark, which reads them from `sys.argv`."""
    known = summaries()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]\n")
        print("\n".join(f"  {n:<14}{line}" for n, line in known.items()))
        return
    if name not in known:
        print(f"error: no benchmark {name!r}, expected one of: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
