"""Exact scores of what a model draws and answers in the embedded `shapes` world."""
