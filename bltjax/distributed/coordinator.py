"""All private names of other libraries that the package imports, behind functions of ours.

A private name may change with any release, so each stands here with its reason and its expected
replacement. Most of them lead to jax's coordinator: process 0 keeps a key-value store, which works
while no device does. A test searches the package for private names in other files.
"""

import jax

# The store, until jax.distributed has one; and this process' index, for which jax.process_index
# would start devices.
from jax._src import distributed

# A process' index in a cluster without joining it, until jax.distributed has a function for it.
from jax._src.clusters import ClusterEnv

# Whether devices have been started, until jax.extend.backend has a function for it.
from jax._src.xla_bridge import backends_are_initialized

joined = jax.distributed.is_initialized  # public; here beside the others


def devices_started() -> bool:
    """Whether jax has started devices, after which processes can't join any more."""
    return backends_are_initialized()


def process_index() -> int:
    """Index of this process. Unlike jax.process_index, it starts no device."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Number of processes. Unlike jax.process_count, it starts no device."""
    return distributed.global_state.num_processes


def place_in_cluster() -> tuple[int, int] | None:
    """Index of this process and number of processes, if jax knows the cluster; connects to
    nothing."""
    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    return cluster and (cluster.get_process_id(), cluster.get_process_count())


def put(key: str, value: str, overwrite: bool = False) -> None:
    """Stores a value in the key-value store.

    Raises:
      JaxRuntimeError: if the key exists and may not be overwritten, or the coordinator is gone.
    """
    distributed.global_state.client.key_value_set(key, value, allow_overwrite=overwrite)


def values_by_process(folder: str) -> dict[int, str]:
    """Values under `folder/INDEX` that have been stored so far, by process."""
    found = distributed.global_state.client.key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): value for key, value in found}


def wait_for_all(name: str, seconds: float) -> None:
    """Returns once every process has called this with the name.

    Raises:
      JaxRuntimeError: on timeout.
    """
    distributed.global_state.client.wait_at_barrier(name, int(seconds * 1000))
