"""Side-by-side measurements against other implementations; each prints one JSON line per measurement."""
