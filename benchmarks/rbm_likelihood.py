"""Held-out likelihood of restricted Boltzmann machines on binary data, with the exact log Z or bounds from both sides.

* ``mushrooms``: 112 binary columns, 23 hidden units; log Z is a sum over 2^23 hidden states.
* ``mnist``: MNIST digits of 14 x 14 binary pixels and 200 hidden units; log Z is bounded from below by annealed importance
  sampling and from above by the way back from draws of the machine.

Chains that only continue may leave modes unseen that the data do not have, and the bounds of log Z show it. By plain pcd on
the digits (``--restarts 0 --levels 2000``) the bounds are 0.01 nats apart with 5 Gibbs steps per update and 70 nats with 10:
the second machine has a mode that its chains never reached. So a few of the digits' chains restart from coin flips at each
update, as in "replay". The chains of the mushrooms all continue: with restarts the likelihood is lower, as new chains
need more steps than an update gives them.

Both are trained by persistent chains with block Gibbs and Adam, whose rate falls to 0. The data are archives with packed
bits, ``np.unpackbits(z["train"], axis=1)[:, :int(z["nvar"])]`` (``x`` and 196 columns for the digits).

    python benchmarks/rbm_likelihood.py mushrooms mushrooms.npz
    python benchmarks/rbm_likelihood.py mnist mnist14_t10k_binary.npz
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM

DEFAULTS = {
    "mushrooms": {"hidden": 23, "steps": 20_000, "gibbs_steps": 10, "batch": 250, "restarts": 0.0},
    "mnist": {"hidden": 200, "steps": 5_000, "gibbs_steps": 5, "batch": 100, "restarts": 0.02},
}


def load(data: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the held-out rows."""
    archive = np.load(path)
    if data == "mushrooms":
        train, test = (np.unpackbits(archive[name], axis=1)[:, : int(archive["nvar"])] for name in ("train", "test"))
        return train.astype(int), test.astype(int)
    x = np.unpackbits(archive["x"], axis=1)[:, :196].astype(int)
    return x[:9000], x[9000:]


def model(x, start, batch):
    """Declare the rows as draws of a machine whose offsets are the means of the data."""
    energy = RBM(
        numpyro.param("weights", start.weights),
        numpyro.param("visible_biases", start.visible_biases),
        numpyro.param("hidden_biases", start.hidden_biases),
        start.visible_offsets,
        start.hidden_offsets,
    )
    with numpyro.plate("rows", len(x), subsample_size=batch):
        numpyro.sample("x", ebm.EnergyDistribution(energy), obs=numpyro.subsample(x, event_dim=1))


def method_of(num_visible: int, args) -> ebm.PersistentContrastiveDivergence | ebm.Replay:
    """Return the estimator: persistent chains, of which a share restarts from coin flips."""
    if not args.restarts:
        return ebm.PersistentContrastiveDivergence(args.gibbs_steps, kernel="block_gibbs", num_chains=args.chains)
    coins = numpyro.distributions.Bernoulli(0.5 * jnp.ones(num_visible)).to_event(1)
    sizes = {"buffer_size": args.chains, "reinit_prob": args.restarts}
    return ebm.Replay(args.gibbs_steps, kernel="block_gibbs", start=coins, **sizes)


def train(x: np.ndarray, args) -> RBM:
    """Train by persistent chains."""
    rates = np.clip(x.mean(0), 0.01, 0.99)
    weights = 0.01 * np.random.default_rng(args.seed).normal(size=(x.shape[1], args.hidden))
    start = RBM(weights, np.log(rates / (1 - rates)), 0.0, rates, 0.5)
    estimated = ebm.estimate(model, method_of(x.shape[1], args))
    rate = optax.cosine_decay_schedule(args.rate, args.steps, 0.001)
    svi = SVI(estimated, ebm.empty_guide, optax.adam(rate), Trace_ELBO())
    rows, chunk = jnp.asarray(x), args.steps // 100

    @jax.jit
    def updates(state, rows):
        return jax.lax.scan(lambda s, _: (svi.update(s, rows, start, args.batch)[0], None), state, None, chunk)[0]

    state = svi.init(jax.random.key(args.seed), rows, start, args.batch)
    for _ in tqdm(range(100), desc=args.data, unit="%", leave=False):
        state = jax.block_until_ready(updates(state, rows))
    params = svi.get_params(state)
    return RBM(params["weights"], params["visible_biases"], params["hidden_biases"], rates, 0.5)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(DEFAULTS))
    parser.add_argument("path", type=Path, help="the archive")
    parser.add_argument("--hidden", type=int, help="hidden units; 23 for mushrooms, 200 for mnist")
    parser.add_argument("--steps", type=int, help="updates; 20000 for mushrooms, 5000 for mnist")
    parser.add_argument("--gibbs-steps", type=int, help="Gibbs steps per update; 10 for mushrooms, 5 for mnist")
    parser.add_argument("--batch", type=int, help="rows per update; 250 for mushrooms, 100 for mnist")
    parser.add_argument("--restarts", type=float, help="share of chains that restart at each update; 0.02 for mnist")
    parser.add_argument("--chains", type=int, default=500)
    parser.add_argument("--rate", type=float, default=3e-3, help="first rate of Adam")
    parser.add_argument("--levels", type=int, default=10_000, help="levels of annealed importance sampling")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.data].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    x, held_out = load(args.data, args.path)
    began = time.time()
    energy = train(x, args)
    trained = time.time() - began
    free = [float(jnp.mean(jax.vmap(energy)(jnp.asarray(rows)))) for rows in (x, held_out)]
    print(f"{args.data}: {len(x)} rows, {args.hidden} hidden units, {args.steps} updates in {trained:.0f} s")
    if args.data == "mushrooms":
        log_z = float(energy.log_partition())
        print(f"log Z {log_z:.3f} (exact); log-likelihood train {-free[0] - log_z:.3f}, held out {-free[1] - log_z:.3f}")
        return {"train": -free[0] - log_z, "held_out": -free[1] - log_z}
    rates = np.clip(x.mean(0), 0.01, 0.99)
    start = numpyro.distributions.Bernoulli(np.concatenate([rates, np.full(args.hidden, 0.5)])).to_event(1)
    distribution = ebm.EnergyDistribution(energy.joint())
    draws = ebm.sample(
        jax.random.key(2), distribution, "block_gibbs", num_warmup=5000, num_samples=1, num_chains=args.chains
    ).samples["x"][:, 0]
    options = {"kernel": "block_gibbs", "start": start, "num_levels": args.levels, "num_chains": args.chains}
    bounds = ebm.log_partition_bounds(jax.random.key(1), distribution, draws=draws, **options)
    print(bounds)
    low, high = (-free[1] - float(each.value) for each in (bounds.upper, bounds.lower))
    print(f"log-likelihood held out between {low:.3f} and {high:.3f}")
    return {"low": low, "high": high}


if __name__ == "__main__":
    main()
