"""Configs of experiments.self_instruct."""
