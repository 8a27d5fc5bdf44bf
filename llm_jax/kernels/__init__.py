"""Attention implementations behind one call."""
