"""Configs of experiments.ghost_attention."""
