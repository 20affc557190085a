"""Checkpoints of Hugging Face in and out, bit for bit: python -m jflow.convert --help."""
