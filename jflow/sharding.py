"""Where every array lies: a mesh of devices, and one table from what an axis means to mesh axes.

`data` and `fsdp` split the rows of a batch; `fsdp` splits the parameters too, which are gathered
layer by layer; `tensor` splits heads, hidden units and the vocabulary. Parameters, moments and
averages of the same path lie alike. Programs run inside `jax.set_mesh(mesh)`; outside of it
nothing is constrained, and one device computes what it always did.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# What an axis means -> the mesh axes that split it.
MESH_AXES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Path of a parameter -> what its last axes mean, None: never split. Layers are stacked in front
# and never split. Each parameter is matched by exactly one row.
PARAMETER_AXES = (
    # Vectors and what is hardly more: everywhere.
    (r".*/(scale|bias|weight|latent|pos_embed|depthwise_kernel|in_conv_kernel|\w+_bias)", ()),
    (r".*/lora_[ab]", ()),
    (r".*/beg_of_und_embed", ()),
    # The language model.
    (r".*/embed_tokens", ("vocab", "embed")),
    (r".*/self_attn/[qkv]_proj/kernel", ("embed", "heads")),
    (r".*/self_attn/o_proj/kernel", ("heads", "embed")),
    (r".*/mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
    (r".*/mlp/down_proj/kernel", ("mlp", "embed")),
    (r".*/lm_head/kernel", ("embed", "vocab")),
    # SigLIP. Queries, keys and values are one product: pieces of it would not be whole heads.
    (r".*/patch_embed_kernel", (None, "embed")),
    (r".*/attn/qkv/kernel", ("embed", None)),
    (r".*/attn/proj/kernel", ("heads", "embed")),
    (r".*/mlp/fc1/kernel", ("embed", "mlp")),
    (r".*/mlp/fc2/kernel", ("mlp", "embed")),
    (r".*/attn_pool/(q|kv|proj)/kernel", ("embed", None)),
    # The generation encoder and decoder, the aligners, the REPA head.
    (r".*/channelwise_linear_1/kernel", ("embed", "mlp")),
    (r".*/channelwise_linear_2/kernel", ("mlp", "embed")),
    (r".*/(cond_embeds_mapper|time_embed_linear_[12]|unpatch_conv)/kernel", ("embed", None)),
    (r".*/vision_\w+_aligner/kernel", ("embed", None)),
    (r"repa/linear_[123]/kernel", ("embed", None)),
    # The VAE: convolutions [kh, kw, in, out] and the products of its attention.
    (r"vae/.*(conv\w*|to_(q|k|v|out_0))/kernel", ("embed", None)),
)

# An array of fewer numbers than this stays whole along an axis that does not divide.
SMALL = 2**20


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; -1, at most once, takes all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = vars(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be at least 1, or -1 for the rest, not {size}.")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("Only one size of the mesh can be -1, which takes all that is left.")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: all there are) with axes data, fsdp, tensor.

    Of several TPU slices each has a part of `data`: what crosses the network between them is the
    sum of gradients alone.

    Raises ValueError where the sizes do not multiply to the number of devices, and where slices do
    not divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(vars(config))
    given = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            if len(devices) % given:
                raise ValueError(
                    f"mesh.{name} cannot take the rest: {shown} does not divide {len(devices)} "
                    f"devices."
                )
            sizes[name] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"The mesh {shown} is for {given} devices, but there are {len(devices)}.")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise ValueError(f"mesh.data={sizes['data']} does not divide over {slices} slices.")
    # jax.make_mesh refuses data=4, fsdp=16 on v6e-64, where an axis is a part of a side of 8 x 8.
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_heads(heads: int, kv_heads: int, mesh: Mesh) -> None:
    """Raises ValueError where the language model's heads do not divide over mesh axis tensor."""
    size = mesh.shape["tensor"]
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % size:
            raise ValueError(f"{name} {count} does not divide over mesh.tensor={size}.")


def spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array with these axes lies on the mesh; along what does not divide it is whole."""
    names = [MESH_AXES.get(axis, ()) for axis in axes]
    return PartitionSpec(
        *(
            mesh_axes if mesh_axes and size % _devices(mesh_axes, mesh) == 0 else None
            for size, mesh_axes in zip(shape, names, strict=True)
        )
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, split along its axes as the mesh in use has it; x itself where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table [vocab, D], split as "vocab" and "embed", by tokens [B, T] -> [B, T, D].

    On a mesh each device looks up its columns for the rows of the batch that its `fsdp`
    neighbours have, and they exchange what they found: that is less than the table, and its
    gradient needs no sum over them.
    """
    mesh, batch = jax.sharding.get_abstract_mesh(), MESH_AXES["batch"]
    if not _splits(mesh, tokens) or table.shape[1] % mesh.shape["fsdp"]:
        return jnp.take(table, tokens, axis=0)

    def local(columns, tokens):
        tokens = jax.lax.all_gather(tokens, "fsdp", tiled=True)
        found = jnp.take(columns, tokens, axis=0)
        return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(None, "fsdp"), PartitionSpec(batch)),
        out_specs=PartitionSpec(batch),
        axis_names=set(batch),
        check_vma=False,
    )(table, tokens)


def by_rows(compute: Callable, weight: jax.Array, *rows: jax.Array) -> jax.Array:
    """compute(weight, *rows) on each device's own rows -> [B], a number of each row.

    The weight is gathered once before and its gradient summed once behind, however many times
    `compute` uses it in a loop; left to itself, the partitioner does both in every turn of it.

    Args:
      compute: gives [b] for its b rows. weight: [D, V], split as "embed" and "vocab".
      rows: arrays [B, ...].
    """
    mesh, batch = jax.sharding.get_abstract_mesh(), MESH_AXES["batch"]
    if not _splits(mesh, rows[0]):
        return compute(weight, *rows)
    # A gather written here would take in the pieces of `tensor` too; the partitioner's does not.
    split = weight.shape[0] % mesh.shape["fsdp"] == 0 and mesh.shape["tensor"] == 1

    def local(weight, *rows):
        if split:
            weight = jax.lax.all_gather(weight, "fsdp", tiled=True)
        return compute(constrain(weight, None, "vocab"), *rows)

    own = PartitionSpec(batch)
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec("fsdp" if split else None), *(own for _ in rows)),
        out_specs=own,
        axis_names=set(batch),
        check_vma=False,
    )(weight, *rows)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where every leaf of a tree of parameters, or of a whole training state, lies.

    Args:
      tree: of arrays or jax.ShapeDtypeStruct; leaves under dicts are parameters or what belongs
        to one (a moment, an average), their path the keys joined by "/", whether the dicts are
        nested or flat: "janusflow/norm/scale". Leaves under no dict are counters, and everywhere.

    Returns: a tree of NamedSharding. Raises ValueError in one sentence for paths that
    PARAMETER_AXES does not match exactly once, and for a large array that does not divide.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = ["/".join(k.key for k in keys if hasattr(k, "key")) for keys, _ in flat]
    rows = {path: [axes for row, axes in PARAMETER_AXES if re.fullmatch(row, path)]
            for path in paths if path}  # fmt: skip
    unclear = [path for path, found in rows.items() if len(found) != 1]
    if unclear:
        raise ValueError(
            f"Exactly one row of jflow.sharding.PARAMETER_AXES must match each parameter; it is "
            f"not so for {', '.join(unclear)}."
        )
    specs = [
        _parameter_spec(path, leaf.shape, rows[path][0], mesh) if path else PartitionSpec()
        for path, (_, leaf) in zip(paths, flat, strict=True)
    ]
    return structure.unflatten([NamedSharding(mesh, each) for each in specs])


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The tree as jax.ShapeDtypeStruct that know where they lie, to restore into or compile for."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(tree, mesh),
    )


def _parameter_spec(path, shape, axes, mesh) -> PartitionSpec:
    axes = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = MESH_AXES.get(axis, ())
        if size % _devices(mesh_axes, mesh) and math.prod(shape) >= SMALL:
            raise ValueError(
                f"Dimension {axis} = {size} of {path} {list(shape)} does not divide over "
                f"mesh.{'*'.join(mesh_axes)}={_devices(mesh_axes, mesh)}."
            )
    return spec(shape, axes, mesh)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What `jax.jit` is to be told for the programs of a mesh.

    TPU: to gather a layer's parameters whole. Where a chip has many rows its compiler would rather
    send them around in pieces, each followed by a part of the product ("windowed einsum"), and
    write the sum to memory after each: 5 times the traffic for stage 2 on v5p-64 (docs/plans.md).
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def row_multiple(mesh: Mesh | AbstractMesh) -> int:
    """What the rows of a batch must be a multiple of."""
    return _devices(MESH_AXES["batch"], mesh)


@functools.cache
def row_share(mesh: Mesh) -> tuple[int, int]:
    """(n, count): this process's devices have the n-th of `count` equal shares of a batch's rows.

    Processes that only `tensor` tells apart have the same share. Raises ValueError where a
    process has only a part of another's share.
    """
    if jax.process_count() == 1:
        return 0, 1
    owners = np.array([device.process_index for device in mesh.devices.flat])
    owners = owners.reshape(row_multiple(mesh), -1)
    rows = {process: tuple(np.nonzero((owners == process).any(1))[0]) for process in owners.flat}
    shares = sorted(set(rows.values()))
    if sum(map(len, shares)) != len(owners) or len(set(map(len, shares))) > 1:
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']} does not fit the processes: it must divide the "
            f"devices of a process, or be a multiple of them."
        )
    return shares.index(rows[jax.process_index()]), len(shares)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of numpy arrays onto the mesh, its rows split.

    Args:
      batch: this process's share of the rows (`row_share`); all rows where there is one process.

    Raises ValueError where the rows do not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))
    wanted = row_multiple(mesh)
    _, shares = row_share(mesh)

    def place(leaf):
        rows = len(leaf) * shares
        if rows % wanted:
            raise ValueError(
                f"A batch of {rows} rows does not divide over mesh.data*fsdp={wanted}."
            )
        return jax.make_array_from_process_local_data(sharding, leaf, (rows, *leaf.shape[1:]))

    return jax.tree.map(place, batch)


def _splits(mesh: AbstractMesh, rows: jax.Array) -> bool:
    """Does a mesh give each device fewer of these rows than there are?"""
    return not mesh.empty and row_multiple(mesh) > 1 and len(rows) % row_multiple(mesh) == 0


def _devices(mesh_axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)
