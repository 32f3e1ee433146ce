"""Makes `bench` importable: it is no part of the package, and the repository's root is not on the path."""

import importlib.util
import sys
from pathlib import Path

if "bench" not in sys.modules:
    _folder = Path(__file__).parents[2] / "bench"
    _spec = importlib.util.spec_from_file_location(
        "bench", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)
