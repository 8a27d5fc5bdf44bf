"""Reading models that others trained, and handing ours to their software."""
