"""Tests compute in exact float32, also where the hardware would round."""

import jax

jax.config.update("jax_default_matmul_precision", "highest")
