"""From files of text to global batches on the mesh."""

import os

# Daft reports every import to its makers, unless it is told not to before that.
os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
# By default Daft's allocator gives back to the system what was freed a second ago, and large blocks at once: a
# twentieth of the corpus factory's time went into getting them again. It costs some 0.1 GB, of which fewer arenas save
# most: what is freed in one is not used again in another.
ALLOCATOR = f"oversize_threshold:0,dirty_decay_ms:30000,thp:always,narenas:{os.cpu_count() or 1}"
os.environ.setdefault("_RJEM_MALLOC_CONF", ALLOCATOR)
