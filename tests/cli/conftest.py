"""Runs made up for tests; see ``tests/tracking/fabricate.py``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

bench = importlib.import_module("fabricate").bench
