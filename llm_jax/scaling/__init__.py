"""Scaling laws: what a model costs, sweeps of small models, the laws fitted to them, and what they predict."""
