"""The train step, the loop around it, checkpoints and metrics."""
