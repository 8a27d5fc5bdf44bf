"""Configs of experiments.elastic."""
