"""Weights of other programs to ours and back."""
