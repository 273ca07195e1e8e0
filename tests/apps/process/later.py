"""Starts once the file /later is there; until then its import fails."""
import os

if not os.path.exists("/later"):
    raise RuntimeError("not yet")

from main import app  # noqa: E402,F401
