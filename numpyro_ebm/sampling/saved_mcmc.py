"""`run_mcmc`: NumPyro's MCMC in blocks that are saved while it runs."""

import copy
import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key, nested_attrgetter
from tqdm import tqdm

from numpyro_ebm._core import programs
from numpyro_ebm._core.digests import checksum, digest, without_addresses
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.storage import Storage, from_outline, outline
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.sampling import target

NO_SETTINGS = ("self", "model", "params", "potential_fn", "moves", "num_discrete_updates")
"""Arguments of a kernel that are not compared as text: some kernels replace them in a run. What they compute is compared."""


def run_mcmc(
    rng_key: PRNGKey,
    mcmc: MCMC,
    *args: Any,
    checkpoint: str | os.PathLike,
    save_every: int = 1000,
    extra_fields: tuple[str, ...] = (),
    init_params: Any = None,
    **kwargs: Any,
) -> None:
    """Run NumPyro's MCMC as ``mcmc.run`` does, and save draws and state after every block of transitions.

    The draws are those of ``mcmc.run`` under the same key, and afterwards ``mcmc`` holds them all. The same call after a
    crash goes on after the last block, and with more ``num_samples`` after the last draw. Each block compiles its loop,
    which takes about a second, so that blocks should take minutes.

    Args:
        rng_key: random key.
        mcmc: NumPyro's MCMC with any kernel, such as `BlackJAXKernel`, `ExchangeKernel` or ``NUTS``.
        *args: arguments of the model.
        checkpoint: a folder for the blocks (extra ``checkpoint``).
        save_every: number of transitions per block, a multiple of ``mcmc.thinning``.
        extra_fields: names of further fields of the state to keep, as in ``mcmc.run``.
        init_params: initial values, as in ``mcmc.run``.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) for a ``save_every`` that does not fit, and for a folder of another run, naming the
            difference: the kernel and its settings, the model with its parameters, the data, the initial values, the
            numbers of chains and of warm-up transitions, the version, or anything else in what the chains compute.
        CheckpointError: (an OSError) if a block cannot be written or read; ``mcmc`` holds the draws so far.
        ImportError: without orbax.
        TypeError: for anything but NumPyro's MCMC.

    Warns:
        UserWarning: if an interruption (Ctrl-C) ends the run; ``mcmc`` holds the draws of whole blocks.

    Example:
        ::

            mcmc = MCMC(ebm.ExchangeKernel(model), num_warmup=500, num_samples=50_000, num_chains=4)
            ebm.run_mcmc(jax.random.key(0), mcmc, x, checkpoint="runs/exchange", save_every=5000)
            mcmc.print_summary()
    """
    check_key("run_mcmc", rng_key)
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"run_mcmc needs a numpyro.infer.MCMC; got {type(mcmc).__name__}. Write MCMC(NUTS(model), ...).")
    check_count("run_mcmc", "save_every", save_every)
    if save_every % mcmc.thinning:
        raise EnergyError(f"save_every={save_every} has to be a multiple of thinning={mcmc.thinning}.")
    args, kwargs = as_arrays("run_mcmc", (args, kwargs))
    fields: dict[str, Any] = {"extra_fields": extra_fields, "init_params": init_params}
    identity = _identity(mcmc, rng_key, init_params, args, kwargs) | {"extra fields": str(tuple(extra_fields))}
    with Storage(checkpoint, identity, keeps_all=True) as storage, _in_blocks(mcmc) as (num_samples, has_bar):
        blocks, state = _stored(storage)  # the state of any kernel
        if state is None:
            mcmc.warmup(rng_key, *args, **fields, **kwargs)
            state: Any = mcmc.last_state
            _save(storage, 0, {}, state)
        try:
            with tqdm(total=num_samples, initial=storage.step or 0, disable=not has_bar) as bar:
                while (done := storage.step or 0) < num_samples:
                    mcmc.post_warmup_state, mcmc.num_samples = state, min(save_every, num_samples - done)
                    mcmc.run(state.rng_key, *args, **fields, **kwargs)
                    state = mcmc.last_state
                    blocks.append(jax.device_get(mcmc._states))
                    _save(storage, done + mcmc.num_samples, blocks[-1], state)
                    bar.update(mcmc.num_samples)
        except KeyboardInterrupt:
            warnings.warn(f"run_mcmc was interrupted: mcmc holds the first {storage.step} draws.", UserWarning, stacklevel=2)
        finally:
            _hold(mcmc, blocks, state)


@contextmanager
def _in_blocks(mcmc: MCMC) -> Iterator[tuple[int, bool]]:
    """Yield the number of samples and whether there is a progress bar, and set both back at the end."""
    before = mcmc.num_samples, mcmc.progress_bar
    mcmc.progress_bar = False
    try:
        yield before
    finally:
        mcmc.num_samples, mcmc.progress_bar = before


def _identity(mcmc: MCMC, rng_key: PRNGKey, init_params: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return what identifies a run: all that its chains compute, and the parts of it that a message can name."""
    sampler: Any = mcmc.sampler
    model, params = getattr(sampler, "model", None), getattr(sampler, "_params", None)
    return {
        "version of numpyro-ebm": version("numpyro-ebm"),
        "kernel": _text(sampler),
        "data": _of_arrays((args, kwargs)),
        **({} if model is None else _of_model(model, params or {}, args, kwargs)),
        "chains": f"{mcmc.num_chains}, {mcmc.chain_method}",
        "warm-up and thinning": f"{mcmc.num_warmup}, {mcmc.thinning}",
        "random key": checksum([rng_key]),
        "init_params": _of_arrays(jax.tree.map(jnp.asarray, init_params)),
        "computation (potential energy, kernel, postprocess_fn)": _of_chains(mcmc, rng_key, init_params, args, kwargs),
    }


def _text(value: Any) -> str:
    """Return a setting as text: of a kernel, what its constructor took and it holds under the same name."""
    if not isinstance(value, MCMCKernel):
        arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array | np.ndarray) and leaf.size > 1]
        sums = f" with checksum {checksum(arrays)}" if arrays else ""  # the text of a large array leaves numbers out
        return getattr(value, "__qualname__", None) or without_addresses(repr(value)) + sums
    names = [name for name in inspect.signature(type(value).__init__).parameters if name not in NO_SETTINGS]
    found = {name: getattr(value, f"_{name}", getattr(value, name, None)) for name in names}
    settings = [f"{name}={_text(each)}" for name, each in found.items() if each is not None]
    return f"{type(value).__name__}({', '.join(settings)})"


def _of_arrays(values: Any) -> str:
    """Return the types, the shapes and a checksum of the arrays among some values."""
    arrays = [each for each in jax.tree.leaves(values) if hasattr(each, "shape")]
    return f"{[f'{each.dtype}{list(each.shape)}' for each in arrays]}, checksum {checksum(arrays)}"


def _of_model(model: Callable, params: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return the sites of a model with their shapes, and digests of their weighted densities and of what it computes."""
    found: list[str] = []

    def run() -> dict[str, Any]:
        trace = target.trace_at_start(handlers.substitute(model, data=dict(params)), args, dict(kwargs))
        sites = [site for site in trace.values() if site["type"] in ("sample", "param", "plate", "deterministic")]
        found[:] = [f"{site['name']} {site['type']} {list(jnp.shape(site['value']))}" for site in sites]
        return trace

    def densities() -> list[Any]:
        return [_of_density(site) for site in run().values() if site["type"] == "sample"]

    def deterministic() -> list[Any]:
        return [site["value"] for site in run().values() if site["type"] == "deterministic"]

    digests = {"densities": _digest(densities), "deterministic sites": _digest(deterministic)}
    return {"sites": str(found), **digests}


def _of_density(site: dict[str, Any]) -> Any:
    """Return the log density of a site as it counts, and its latent value, which is computed from its support."""
    log_density = site["fn"].log_prob(site["value"])
    weighted = log_density if site["scale"] is None else site["scale"] * log_density
    return weighted, () if site["is_observed"] else site["value"]


def _of_chains(mcmc: MCMC, rng_key: PRNGKey, init_params: Any, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Return a digest of what the chains compute: their start, a transition, and what is kept of a draw."""
    # A kernel keeps what it has traced, so this is a copy of it; its model is shared.
    model = getattr(mcmc.sampler, "model", None)
    sampler: Any = copy.deepcopy(mcmc.sampler, {id(model): model})
    key = rng_key if is_prng_key(rng_key) else rng_key[0]
    is_batch = mcmc.num_chains > 1 and mcmc.chain_method == "vectorized"
    if is_batch:
        key = jax.random.split(key, mcmc.num_chains)
    elif mcmc.num_chains > 1:
        init_params = jax.tree.map(lambda leaf: leaf[0], init_params)

    def run(key, init_params):
        state = sampler.init(key, mcmc.num_warmup, init_params, model_args=args, model_kwargs=kwargs)
        state = sampler.sample(state, args, kwargs)
        draw = nested_attrgetter(sampler.sample_field)(state)
        draw = jax.tree.map(lambda leaf: leaf[0], draw) if is_batch else draw
        return state, (mcmc.postprocess_fn or sampler.postprocess_fn(args, kwargs))(draw)

    return _digest(run, key, init_params)


def _digest(function: Callable, *args: Any) -> str:
    """Return a digest of the program of a function."""
    program = programs.trace(function, *args)
    return digest(program.code.jaxpr, program.constants)


def _save(storage: Storage, step: int, block: Mapping[str, Any], state: Any) -> None:
    """Store the draws of a block, with the state after it."""
    held = np.frombuffer(pickle.dumps(state), np.uint8)
    arrays = {"block": dict(block), "state": held}
    storage.save(step, arrays, {"outline": outline(arrays)})


def _stored(storage: Storage) -> tuple[list[dict[str, Any]], Any]:
    """Return the draws of all blocks in the folder, and the state after the last; no draws and None for an empty folder."""
    blocks: list[dict[str, Any]] = []
    state: Any = None
    for step in storage.steps:
        arrays = storage.arrays(from_outline(storage.about(step)["outline"]), step)
        state = arrays["state"]
        if step:
            blocks.append(jax.tree.map(np.asarray, arrays["block"]))
    return blocks, None if state is None else pickle.loads(np.asarray(state).tobytes())


def _hold(mcmc: MCMC, blocks: list[dict[str, Any]], state: Any) -> None:
    """Let ``mcmc`` hold the draws of all blocks, as after one run."""
    mcmc.post_warmup_state = None
    if blocks:
        mcmc._states = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *blocks)
        mcmc._states_flat, mcmc._last_state = None, state
