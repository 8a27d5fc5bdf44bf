"""Configs of experiments.corpus_report."""
