"""XLA's persistent compilation cache, how long compiling took, and its want of memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jflow" / "xla"

# Tracing, lowering and compiling (or reading the compiled program back) of one function.
_DURATIONS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


# For programs that read their weights over and over: XLA for GPUs would join those with a common
# factor (of queries and keys, of gate and up) by copying them, in every run.
WEIGHTS_STAY = {"xla_gpu_dot_merger_threshold_mb": 0}


def out_of_memory(error: Exception) -> bool:
    """Is this what is raised for want of a host's or a device's memory?"""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@dataclass
class CompileStats:
    """seconds spent until programs were ready; programs compiled, and read from the cache."""

    seconds: float = 0.0
    compiled: int = 0
    cached: int = 0


def enable_cache() -> CompileStats:
    """Keeps every compiled program on disk, and returns a live account of this process's compiling.

    The folder is $JAX_COMPILATION_CACHE_DIR if set, else ~/.cache/jflow/xla.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(CACHE_DIR))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    stats = CompileStats()

    def on_duration(event: str, seconds: float, **_):
        if event in _DURATIONS:
            stats.seconds += seconds

    def on_event(event: str, **_):
        stats.compiled += event == "/jax/compilation_cache/cache_misses"
        stats.cached += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    return stats
