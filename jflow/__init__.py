"""jflow: JanusFlow (arXiv 2411.07975) in JAX/Flax."""

__version__ = "0.1.0"
