"""From the name of a slice or a host to devices that programs can be compiled for."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jflow.plan.hardware import CHIPS, Chip, target_config

# How the chips of a slice are wired, by their number.
_SQUARE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_SHAPES = {"v5e": _SQUARE, "v6e": _SQUARE, "v5p": _CUBE}
_PER_HOST = 8  # GPUs


@dataclass(frozen=True)
class Topology:
    """name: as it was asked for. chip: in hardware.CHIPS. count: of chips. shape: what the compiler
    calls it: "8x8" of a TPU slice, "1x4x8" (partitions, hosts, GPUs of each) of GPUs."""

    name: str
    chip: str
    count: int
    shape: str

    @property
    def hardware(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def incoming(self) -> float:
        """Bytes per second that a chip takes in from the others at best."""
        hosts = self.hardware.network is not None and self.count > _PER_HOST
        return self.hardware.network if hosts else self.hardware.links


def parse(name: str) -> Topology:
    """ "v5e-64", "v5p-64", "v5e:8x8", "8xH100", "1xH200" -> Topology.

    TPU slices are named as Google does: the number behind v5p- is that of cores, two a chip.
    Raises ValueError in one sentence for what is none.
    """
    if found := re.fullmatch(r"(v5e|v5p|v6e)-(\d+)", name):
        chip, number = found[1], int(found[2])
        count = number // 2 if chip == "v5p" else number
        shape = _SHAPES[chip].get(count)
        if shape and not (chip == "v5p" and number % 2):
            return Topology(name, chip, count, shape)
        sizes = ", ".join(str(n * (2 if chip == "v5p" else 1)) for n in _SHAPES[chip])
        raise ValueError(f"There is no slice {name}: {chip}- goes with {sizes}.")
    if found := re.fullmatch(r"(v5e|v5p|v6e):(\d+(?:x\d+){1,2})", name):
        count = math.prod(map(int, found[2].split("x")))
        return Topology(name, found[1], count, found[2])
    gpus = [chip for chip in CHIPS if CHIPS[chip].platform == "cuda"]
    if (found := re.fullmatch(rf"(\d+)x({'|'.join(gpus)})", name)) and int(found[1]):
        count = int(found[1])
        if count > _PER_HOST and count % _PER_HOST:
            raise ValueError(f"{name}: hosts have {_PER_HOST} GPUs; take 1 to 8, or a multiple.")
        hosts = max(1, count // _PER_HOST)
        return Topology(name, found[2], count, f"1x{hosts}x{count // hosts}")
    raise ValueError(
        f"There is no topology {name!r}: name a TPU slice (v5e-64, v5p-64, v6e-64, or v5e:8x8), or "
        f"GPUs (8x{', 8x'.join(gpus)})."
    )


def devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for, in a process that leaves this machine's own accelerators alone.

    Raises ValueError in one sentence where the compiler for them is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.hardware.platform == "tpu":
        return _tpu(topology)
    return _gpu(topology)


def _tpu(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"Planning for {topology.name} needs the TPU compiler: pip install -e '.[plan]'."
        )
    # No metadata server is asked, and other processes may compile at the same time.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    more = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
    name = f"{topology.chip}:{topology.shape}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"The TPU compiler knows no slice {name}: {str(error).splitlines()[0]}"
        ) from error


def _gpu(topology: Topology) -> list[jax.Device]:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(name) for name in plugins):
        raise ValueError(
            f"Planning for {topology.name} needs the CUDA compiler, not a GPU: pip install "
            f"-e '.[plan-cuda]'."
        )
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    # The assembler of the wheel, where there is one.
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        os.environ["PATH"] = f"{folder}/cuda_nvcc/bin{os.pathsep}{os.environ['PATH']}"
    return topologies.get_topology_desc(
        platform="cuda", target_config=target_config(topology.chip), topology=topology.shape
    ).devices
