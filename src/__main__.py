"""`python -m src` tells which verbs there are, `--version` which Boardwalk this is."""

import ast
import sys
from pathlib import Path

from src import __version__

VERBS = (
    *("pipeline", "data", "distill", "pretrain", "cpt", "finetune", "merge", "quantize", "evaluate", "deploy"),
    *("chat", "serve", "answer", "push", "plan", "report", "runs", "summary", "lineage", "aux_files", "doctor", "completion"),
)

if "--version" in sys.argv:
    print(f"boardwalk {__version__}")
    sys.exit(0)
for verb in VERBS:
    folder = Path(__file__).parent
    file = folder / f"{verb}.py" if (folder / f"{verb}.py").is_file() else folder / verb / "__main__.py"
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").replace("\n", " ").split(". ")[0].split(": ")[0]
    print(f"  python -m src.{verb:<10} {first}")
sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
