"""`run_mcmc`: NumPyro's MCMC in blocks that are saved while it runs."""

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
from tqdm import tqdm

from numpyro_ebm._core import programs
from numpyro_ebm._core.digests import checksum, digest, without_addresses
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.storage import Storage, from_outline, outline
from numpyro_ebm._core.typing import PRNGKey


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
            difference: the kernel and its settings, the model with its parameters, the data, the numbers of chains and of
            warm-up transitions, or the version.
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
    identity = _identity(mcmc, rng_key, args, kwargs) | {"extra fields": str(tuple(extra_fields))}
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


def _identity(mcmc: MCMC, rng_key: PRNGKey, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return what identifies a run: the kernel with its settings, the model with all its numbers, the data and the key."""
    sampler: Any = mcmc.sampler
    model, params = getattr(sampler, "model", None), getattr(sampler, "_params", None)
    data = [each for each in jax.tree.leaves((args, kwargs)) if hasattr(each, "shape")]
    return {
        "version of numpyro-ebm": version("numpyro-ebm"),
        "kernel": f"{type(sampler).__name__}({_settings(sampler)})",
        "data": f"{[f'{each.dtype}{list(each.shape)}' for each in data]}, checksum {checksum(data)}",
        **({} if model is None else _of_model(model, params or {}, args, kwargs)),
        "chains": f"{mcmc.num_chains}, {mcmc.chain_method}",
        "warm-up and thinning": f"{mcmc.num_warmup}, {mcmc.thinning}",
        "random key": checksum([rng_key]),
    }


def _settings(sampler: MCMCKernel) -> str:
    """Return the settings of a kernel: what its constructor took, and the kernel holds under the same name."""
    found = {}
    for name in inspect.signature(type(sampler).__init__).parameters:
        value = getattr(sampler, f"_{name}", None)
        if name not in ("self", "model", "params") and value is not None:
            found[name] = getattr(value, "__qualname__", None) or without_addresses(repr(value))
    return ", ".join(f"{name}={value}" for name, value in found.items())


def _of_model(model: Callable, params: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return the sites of a model with their shapes, and a digest of its draws and densities."""
    found: list[str] = []

    def run() -> list[Any]:
        trace = handlers.trace(handlers.substitute(handlers.seed(model, 0), data=dict(params))).get_trace(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] in ("sample", "param", "plate")}
        found.extend(f"{name} {site['type']} {list(jnp.shape(site['value']))}" for name, site in sites.items())
        return [site["fn"].log_prob(site["value"]) for site in sites.values() if site["type"] == "sample"]

    with handlers.block():
        program = programs.trace(run)
    return {"sites": str(found), "densities": digest(program.code.jaxpr, program.constants)}


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
