"""A small JanusFlow from nothing: its tokenizer, its SigLIP, its VAE, and the checkpoint of all."""
