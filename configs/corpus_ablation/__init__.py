"""Configs of experiments.corpus_ablation."""
