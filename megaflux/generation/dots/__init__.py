"""Weights of a reference's tokens: dots, GridDot, heat maps, attention maps."""
