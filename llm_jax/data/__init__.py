"""From files of text to global batches on the mesh."""

import os

# Daft reports every import to its makers, unless it is told not to before that.
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
