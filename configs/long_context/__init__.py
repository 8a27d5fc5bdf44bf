"""Configs of the long-context experiment."""
