"""Linear ICA by several estimators: n times the mean squared error of the unmixing matrix, against its known values.

Sources are independent and the mixing is the identity, E(x) = sum_i e((B x)_i). Each estimator starts near the truth (which
fixes the order and the signs of the sources) and trains on the same n rows. The table shows ``n E|B - I|^2``, mean over
replicates (standard error). Known values for large n and d = 4: for Laplace sources of unit variance, maximum likelihood 12,
and "nce" with ten frozen draws of Gaussian noise per row 16.2 (tests/test_efficiency.py), less with draws renewed at each
update; for logistic sources of scale 1, maximum likelihood 67.8 and score matching 82.6. ``rotation`` is the antisymmetric
part, |B - B^T|^2 / 4. The score of a Laplace density is a sign, whose derivative score matching does not see: B shrinks to
0, an error of n d. The kinks move with the rows of B, but "lsd" differentiates the score only at the rows, where this has no
effect: its critic finds the error, the energy does not correct it, and B rotates away.

With the default settings, Laplace sources: mle 11.1 (1.2), sm 8000 (0), nce 14.0 (1.4), and lsd 12900 (3600) over three
replicates. Logistic sources, d = 10: mle 608 (37), sm 750 (40), nce 692 (52); for large n, 494 and 600 are known.

    python benchmarks/ica.py
    python benchmarks/ica.py --methods mle lsd --replicates 2 --steps 300
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import numpyro_ebm as ebm

ENERGIES = {
    "laplace": lambda s: jnp.sqrt(2.0) * jnp.abs(s),
    "logistic": lambda s: s + 2 * jax.nn.softplus(-s),
}
DRAWS = {"laplace": lambda key, shape: jax.random.laplace(key, shape) / jnp.sqrt(2.0), "logistic": jax.random.logistic}


class Method(NamedTuple):
    """A method that estimates B.

    Attributes:
        estimator: name of the estimator, or None for the likelihood itself, with log|det B| in the energy.
        options: options of the estimator.
        optimizer: function from the number of updates to the optimiser.
        updates: updates per requested step.
    """

    estimator: str | None
    options: dict[str, Any]
    optimizer: Callable[[int], optax.GradientTransformation]
    updates: int = 1


def adam(num_updates: int, rate: float = 0.02) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_updates))


def in_turns(num_updates: int) -> optax.GradientTransformation:
    return ebm.alternate(adam(num_updates // 5), adam(num_updates, 1e-3), adversary="x$critic", num_adversary_steps=5)


METHODS = {
    "mle": Method(None, {}, adam),
    "sm": Method("sm", {}, adam),
    "nce": Method("nce", {"nu": 10, "noise": "gaussian"}, adam),
    "lsd": Method("lsd", {"num_projections": None}, in_turns, 5),
}


def make_model(energy: Callable, dim: int, *, normalized: bool) -> Callable:
    def model(x):
        b = numpyro.param("b", lambda key: jnp.eye(dim) + 0.1 * jax.random.normal(key, (dim, dim)))
        log_z = jnp.linalg.slogdet(b)[1] if normalized else 0.0
        density = ebm.EnergyDistribution(lambda x: jnp.sum(energy(b @ x)) - log_z, (dim,), normalized=normalized)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", density, obs=x)

    return model


def make_fit(name: str, args: argparse.Namespace) -> Callable[[jax.Array], jax.Array]:
    """Return a function that draws rows with a random key and returns B fitted to them."""
    method = METHODS[name]
    model = make_model(ENERGIES[args.sources], args.dim, normalized=method.estimator is None)
    if method.estimator is not None:
        model = ebm.estimate(model, method.estimator, **method.options)
    num_updates = args.steps * method.updates
    svi = SVI(model, ebm.empty_guide, method.optimizer(num_updates), Trace_ELBO())

    @jax.jit
    def fit(rng_key):
        key_rows, key_svi = jax.random.split(rng_key)
        x = DRAWS[args.sources](key_rows, (args.rows, args.dim))
        state = svi.init(key_svi, x)
        state = jax.lax.scan(lambda state, _: (svi.update(state, x)[0], None), state, None, length=num_updates)[0]
        return svi.get_params(state)["b"]

    return fit


def errors_of(b: np.ndarray, num_rows: int) -> tuple[float, float]:
    """Return ``n |B - I|^2`` and its antisymmetric part."""
    return num_rows * np.sum((b - np.eye(len(b))) ** 2), num_rows * np.sum((b - b.T) ** 2) / 4


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sources", choices=ENERGIES, default="laplace")
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600, help="training steps of the energy")
    args = parser.parse_args(argv)
    keys = jax.random.split(jax.random.key(0), args.replicates)
    table = {}
    print(f"n E|B - I|^2, {args.sources} sources, d = {args.dim}, n = {args.rows}: mean over replicates (standard error)")
    for name in args.methods:
        fit = make_fit(name, args)
        table[name] = np.array([errors_of(np.asarray(fit(key)), args.rows) for key in tqdm(keys, desc=name)])
        means, errors = table[name].mean(0), table[name].std(0) / np.sqrt(max(args.replicates - 1, 1))
        print(f"{name:>10} {means[0]:9.1f} ({errors[0]:.1f})   rotation {means[1]:9.1f} ({errors[1]:.1f})")
    return table


if __name__ == "__main__":
    main()
