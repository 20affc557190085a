"""The chips that a run can be planned for: what their makers say of them."""

from dataclasses import dataclass

from jflow.training.flops import PEAK


@dataclass(frozen=True)
class Chip:
    """One jax.Device.

    kind: its device_kind, as in flops.PEAK, which has its operations per second. memory: bytes
    that a program can have of its HBM; bandwidth: bytes per second to and from there. links: bytes
    per second that it takes in from the chips it is wired to, all links together. network: the
    same between hosts, None where the links go on there. clock: Hz of the compiler's cycles, None
    where it estimates none. multiprocessors, capability, l2, shared: of GPUs (`target_config`).
    """

    platform: str
    kind: str
    memory: int
    bandwidth: float
    links: float
    network: float | None = None
    clock: float | None = None
    multiprocessors: int = 0
    capability: int = 0
    l2: int = 0
    shared: int = 0

    @property
    def flops(self) -> float:
        """Dense bfloat16 operations per second."""
        return PEAK[self.kind]


def _gib(size: float) -> int:
    return int(size * 2**30)


# TPU: cloud.google.com/tpu/docs/v5e, /v5p, /v6e and jax-ml.github.io/scaling-book/tpus; memory is
# what the compiler allows. Links: 4 of 45 GB/s, 6 of 90 and 4 of 90, in each direction; clock: what
# the matrix units need for the peak. GPU: NVIDIA's data sheets of the SXM modules; NVLink 300 and
# 450 GB/s in each direction, between hosts 200 and 400 Gbit/s a GPU. XLA is given 92% of a GPU's
# memory here (XLA_PYTHON_CLIENT_MEM_FRACTION=0.92), the rest is for CUDA, cuDNN and NCCL.
CHIPS = {
    "v5e": Chip("tpu", "TPU v5e", _gib(15.75), 819e9, 180e9, clock=1.5e9),
    "v5p": Chip("tpu", "TPU v5", _gib(95.74), 2765e9, 540e9, clock=1.75e9),
    "v6e": Chip("tpu", "TPU v6e", _gib(31.25), 1640e9, 360e9, clock=1.75e9),
    "A100-40G": Chip(
        "cuda", "NVIDIA A100", int(0.92 * _gib(39.4)), 1555e9, 300e9, 25e9,
        multiprocessors=108, capability=8, l2=40 * 2**20, shared=164 * 2**10,
    ),
    "A100-80G": Chip(
        "cuda", "NVIDIA A100", int(0.92 * _gib(79.2)), 2039e9, 300e9, 25e9,
        multiprocessors=108, capability=8, l2=40 * 2**20, shared=164 * 2**10,
    ),
    "H100": Chip(
        "cuda", "NVIDIA H100", int(0.92 * _gib(79.1)), 3350e9, 450e9, 50e9,
        multiprocessors=132, capability=9, l2=50 * 2**20, shared=228 * 2**10,
    ),
    "H200": Chip(
        "cuda", "NVIDIA H200", int(0.92 * _gib(139.8)), 4800e9, 450e9, 50e9,
        multiprocessors=132, capability=9, l2=50 * 2**20, shared=228 * 2**10,
    ),
}  # fmt: skip


def target_config(name: str) -> str:
    """What XLA has to know of a GPU that is not here: a stream_executor.GpuTargetConfigProto.

    From the data sheet and the CUDA C++ programming guide's table of compute capabilities.
    """
    chip = CHIPS[name]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {chip.multiprocessors} fpus_per_core: {64 if chip.capability < 9 else 128}
          clock_rate_ghz: {1.41 if chip.capability < 9 else 1.98}
          shared_memory_per_core: {chip.shared} shared_memory_per_block: 49152
          shared_memory_per_block_optin: {chip.shared - 1024}
          l2_cache_size: {chip.l2} memory_bandwidth: {int(chip.bandwidth)}
          device_memory_size: {int(chip.memory / 0.92)}
          cuda_compute_capability {{ major: {chip.capability} minor: 0 }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{chip.kind}"
    """
