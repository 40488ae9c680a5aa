"""The paper's tables and figures from one command: ``python -m benchmarks.paper --help``."""

import sys
from pathlib import Path

# The examples' training loop, images and run folders are used as they are.
_EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)
