"""Configs of experiments.quantize."""
