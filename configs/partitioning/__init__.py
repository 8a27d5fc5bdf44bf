"""Configs of experiments.partitioning."""
