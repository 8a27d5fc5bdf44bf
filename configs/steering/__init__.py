"""Configs of steering reviews."""
