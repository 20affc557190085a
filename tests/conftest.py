"""Tests compute in exact float32, also where the hardware would round."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jflow.convert.__main__ import main as convert
from jflow.inference.pipeline import Pipeline
from tests.goldens import GOLDEN

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def own_programs():
    """Compiled programs end with the module that made them, and so does the cache on disk that
    train.py and sample.py turn on. Some thousand of them take more pieces of memory than a process
    may map, and in a whole run the compiler crashed."""
    yield
    jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compiling():
    """For modules whose time is mostly compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory):
    """The golden checkpoint, converted as a user would."""
    out = tmp_path_factory.mktemp("tiny") / "ckpt"
    source, vae = str(GOLDEN / "tiny"), str(GOLDEN / "vae_tiny")
    assert convert(["from-hf", source, "--vae", vae, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def tiny(tiny_ckpt):
    return Pipeline.from_checkpoint(tiny_ckpt)
