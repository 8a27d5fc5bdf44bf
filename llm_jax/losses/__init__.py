"""Loss functions that return an unreduced sum and a weight."""
