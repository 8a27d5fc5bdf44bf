"""The device mesh, and which mesh axes each logical axis is laid out over."""
