"""Training steps per second of the estimators, compared with a loop written by hand for the same work.

The energies are MLPs 2-128-128-1 and 64-256-256-1 (silu) over a Gaussian base, with batches of 256 and Adam at 1e-3. The
methods are contrastive divergence and persistent chains from a pool of 10 000, with ten steps of unadjusted Langevin; exact
score matching, by hand as the forward Laplacian of this one network; sliced score matching with one direction; and denoising
score matching. The loop by hand does nothing else; ours runs in NumPyro's SVI, with health figures in its state. Each is
compiled as one step and as a scan of 20; figures are medians over repeats.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --kinds sm dsm --repeats 1 --seconds 0.5
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

NETS = {"d2": (2, 128), "d64": (64, 256)}
BATCH, STEPS, STEP_SIZE, POOL, ROWS, SCAN, SIGMA = 256, 10, 0.01, 10_000, 10_000, 20, 0.3


def weights(dim, width):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(dim, width), (width, width), (width, 1)]
    return [(jax.random.normal(k, s) / jnp.sqrt(s[0]), jnp.zeros(s[1])) for k, s in zip(keys, sizes, strict=True)]


def energy(params, x):
    for w, b in params[:-1]:
        x = jax.nn.silu(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[..., 0]


def tilted(params, x):
    """Return the energy over a standard normal base."""
    return energy(params, x) + 0.5 * jnp.sum(x**2, axis=-1)


def langevin(key, params, x):
    score = score_of(params)

    def step(x, key):
        return x + STEP_SIZE * score(x) + jnp.sqrt(2 * STEP_SIZE) * jax.random.normal(key, x.shape), None

    return jax.lax.scan(step, x, jax.random.split(key, STEPS))[0]


def score_of(params):
    return jax.grad(lambda x: -jnp.sum(tilted(params, x)))


def exact_sm(params, key, x):
    """Return the loss by the forward Laplacian: value, Jacobian and Laplacian pass through the network together."""
    jacobian, laplacian = jnp.eye(x.shape[1])[None], 0.0
    h = x
    for w, b in params[:-1]:
        z, jacobian, laplacian = h @ w + b, jacobian @ w, laplacian @ w if h is not x else 0.0
        s = jax.nn.sigmoid(z)
        first, second = s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))
        h, laplacian = z * s, first * laplacian + second * jnp.sum(jacobian**2, axis=1)
        jacobian = first[:, None] * jacobian
    w, _ = params[-1]
    score = -(jacobian @ w)[..., 0] - x
    return jnp.sum(0.5 * score**2) - jnp.sum(laplacian @ w) - x.size


def sliced_sm(params, key, x):
    v = jax.random.rademacher(key, x.shape, x.dtype)
    score, along = jax.jvp(score_of(params), (x,), (v,))
    return jnp.sum(0.5 * jnp.sum(score * v, axis=1) ** 2) + jnp.sum(along * v)


def denoising_sm(params, key, x):
    noise = jax.random.normal(key, x.shape)
    return 0.5 * jnp.sum((score_of(params)(x + SIGMA * noise) + noise / SIGMA) ** 2)


LOSSES = {"sm": exact_sm, "ssm": sliced_sm, "dsm": denoising_sm}
OURS = {
    "cd": {"num_steps": STEPS, "kernel": ebm.Langevin(STEP_SIZE)},
    "pcd": {"num_steps": STEPS, "kernel": ebm.Langevin(STEP_SIZE), "num_chains": POOL},
    "sm": {},
    "ssm": {},
    "dsm": {"sigma": SIGMA},
}


def by_hand(kind, dim, width, data):
    """Return the initial state and the step of the loop that a JAX user would write."""
    optimiser = optax.adam(1e-3)

    def step(state):
        params, moments, pool, key = state
        key, key_rows, key_slots, key_noise = jax.random.split(key, 4)
        x = data[jax.random.randint(key_rows, (BATCH,), 0, ROWS)]
        if kind in LOSSES:
            grads = jax.grad(LOSSES[kind])(params, key_noise, x)
        else:
            slots = jax.random.randint(key_slots, (BATCH,), 0, POOL)
            negatives = langevin(key_noise, params, pool[slots] if kind == "pcd" else x)
            pool = pool.at[slots].set(negatives) if kind == "pcd" else pool
            grads = jax.grad(lambda p: jnp.sum(tilted(p, x)) - jnp.sum(tilted(p, negatives)))(params)
        updates, moments = optimiser.update(grads, moments)
        return optax.apply_updates(params, updates), moments, pool, key

    params = weights(dim, width)
    pool = jax.random.normal(jax.random.key(3), (POOL if kind == "pcd" else 1, dim))
    return (params, optimiser.init(params), pool, jax.random.key(1)), step


def with_svi(kind, dim, width, data):
    """Return the initial state and the step of the same work in numpyro_ebm."""

    def model(x):
        params = numpyro.param("net", weights(dim, width))
        with numpyro.plate("rows", BATCH):
            site = ebm.EnergyDistribution(lambda x: tilted(params, x), (dim,))
            numpyro.sample("x", site, obs=x)

    svi = SVI(ebm.estimate(model, kind, **OURS[kind]), ebm.empty_guide, optax.adam(1e-3), Trace_ELBO())

    def step(state):
        svi_state, key = state
        key, key_rows = jax.random.split(key)
        x = data[jax.random.randint(key_rows, (BATCH,), 0, ROWS)]
        return svi.update(svi_state, x)[0], key

    return (svi.init(jax.random.key(1), data[:BATCH]), jax.random.key(4)), step


def rate(state, step, num_fused: int, args: argparse.Namespace) -> float:
    """Return the steps per second, the median over repeats."""
    fused = jax.jit(lambda state: jax.lax.scan(lambda s, _: (step(s), None), state, None, length=num_fused)[0])
    state = jax.block_until_ready(fused(state))
    rates = []
    for _ in range(args.repeats):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < args.seconds:
            state = jax.block_until_ready(fused(state))
            done += num_fused
        rates.append(done / (time.perf_counter() - start))
    return statistics.median(rates)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per repeat")
    parser.add_argument("--kinds", nargs="+", choices=list(OURS), default=list(OURS))
    args = parser.parse_args(argv)
    rows = []
    print("Training steps per second")
    print(f"{'work':>12} {'by hand':>9} {'ours':>9} {'ratio':>6}   {'by hand, scan':>14} {'ours, scan':>11} {'ratio':>6}")
    for kind in args.kinds:
        for name, (dim, width) in NETS.items():
            data = jax.random.normal(jax.random.key(2), (ROWS, dim))
            values = {}
            for fused in (1, SCAN):
                for who, build in (("hand", by_hand), ("ours", with_svi)):
                    values[who, fused] = rate(*build(kind, dim, width, data), fused, args)
            one, many = (values["ours", n] / values["hand", n] for n in (1, SCAN))
            rows.append({"work": f"{kind} {name}", "one": one, "scan": many})
            print(
                f"{rows[-1]['work']:>12} {values['hand', 1]:9.0f} {values['ours', 1]:9.0f} {one:6.2f}   "
                f"{values['hand', SCAN]:14.0f} {values['ours', SCAN]:11.0f} {many:6.2f}"
            )
    return rows


if __name__ == "__main__":
    main()
