"""A variational autoencoder with a learned prior: an energy of the latent code, trained jointly by one handler.

The data are the digits of scikit-learn (8 x 8 pixels, black or white). A small encoder and decoder are combined with two
priors of the code: a standard normal, and a standard normal times exp(-E(z)) with E a small network (Pang et al. 2020).
Stock SVI trains both from the same seeds for the same number of steps; the energy needs only `numpyro_ebm.estimate`. E is 0
at first, so the two start as the same model. The script prints the importance-weighted bound of held-out digits for each,
including log Z of the energy, and draws digits from both.

    python examples/latent_prior.py                         the table and the picture, about two minutes
    python examples/latent_prior.py --quick                 seconds, to check that it runs
    python examples/latent_prior.py --estimator mle --dim 4
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from tqdm import tqdm

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PIXELS = 64
HIDDEN = 64
BATCH = 128
KERNEL = ebm.HMC(step_size=0.3, num_integration_steps=3)
ESTIMATORS = {
    "pcd": {"num_steps": 5, "kernel": KERNEL, "num_chains": 1000},
    "mle": {"num_steps": 10, "kernel": KERNEL},
    "cd": {"num_steps": 10, "kernel": KERNEL},
    "nce": {"nu": 10},
}
LECUN = nnx.initializers.lecun_normal()


class Layers(nnx.Module):
    """A network with two hidden layers; encoder, decoder and energy all have this form."""

    def __init__(self, inputs: int, outputs: int, seed: int, last_init=LECUN):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(inputs, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, outputs, kernel_init=last_init, rngs=rngs)

    def __call__(self, x):
        """Return the output for one code or image, or for a batch of them."""
        return self.last(nnx.silu(self.second(nnx.silu(self.first(x)))))


class Autoencoder:
    """A variational autoencoder: the model, its guide, and its prior by name ("normal" or "energy")."""

    def __init__(self, prior: str, dim: int, seed: int):
        self.prior, self.dim = prior, dim
        self.base = dist.Normal(0, 1).expand([dim]).to_event(1)
        self.encoder = Layers(PIXELS, 2 * dim, 3 * seed)
        self.decoder = Layers(dim, PIXELS, 3 * seed + 1)
        self.energy = Layers(dim, 1, 3 * seed + 2, nnx.initializers.zeros_init())

    def code(self):
        """Return the prior of one code."""
        if self.prior == "normal":
            return self.base
        return ebm.EnergyDistribution(nnx_module("energy", self.energy), (self.dim,), base=self.base)

    def pixels(self, z):
        """Return the likelihood of one image given its code."""
        return dist.Bernoulli(logits=nnx_module("decoder", self.decoder)(z)).to_event(1)

    def posterior(self, x):
        """Return the guide's distribution of the code of one image."""
        loc, log_scale = jnp.split(nnx_module("encoder", self.encoder)(x), 2, axis=-1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def model(self, x):
        """Draw codes from the prior and images from codes, in batches."""
        code = self.code()
        with numpyro.plate("rows", len(x), subsample_size=BATCH):
            z = numpyro.sample("z", code)
            numpyro.sample("x", self.pixels(z), obs=numpyro.subsample(x, event_dim=1))

    def guide(self, x):
        """Draw codes given images."""
        with numpyro.plate("rows", len(x), subsample_size=BATCH):
            numpyro.sample("z", self.posterior(numpyro.subsample(x, event_dim=1)))


class Result(NamedTuple):
    """One trained autoencoder: its row of the table, its bound for each digit, codes of the data, and draws."""

    row: dict
    bound: np.ndarray
    codes: np.ndarray
    draws: np.ndarray
    images: np.ndarray


def load() -> tuple[jax.Array, jax.Array]:
    """Load black and white digits: 1437 for training, 360 held out."""
    digits = load_digits().data >= 8
    digits = digits[np.random.default_rng(0).permutation(len(digits))].astype(np.float32)
    return jnp.asarray(digits[:1437]), jnp.asarray(digits[1437:])


def train(vae: Autoencoder, x: jax.Array, seed: int, args: argparse.Namespace) -> tuple[dict, float]:
    """Train by SVI, with smaller steps for the energy so that the chains keep up with it."""
    model = vae.model
    if vae.prior == "energy":
        model = ebm.estimate(vae.model, args.estimator, **ESTIMATORS[args.estimator])
    steps = optax.adamw(optax.cosine_decay_schedule(args.rate, args.steps), weight_decay=0.01)
    optimiser = optax.multi_transform(
        {"networks": steps, "prior": optax.chain(steps, optax.scale(0.3))},
        lambda params: {name: "prior" if name.startswith(("energy", "z$")) else "networks" for name in params},
    )
    svi = SVI(model, vae.guide, optimiser, Trace_ELBO())
    chunk = max(args.steps // 20, 1)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: svi.update(s, x), state, None, length=chunk)

    start = time.time()
    state = svi.init(jax.random.key(seed), x)
    bar = tqdm(range(0, args.steps, chunk), desc=f"{vae.prior} prior, seed {seed}", unit="chunk", leave=False)
    for _ in bar:
        state, losses = run(state)
        bar.set_postfix_str(f"loss {float(losses.mean()) / len(x):.2f}")
    return svi.get_params(state), time.time() - start


def with_params(params: dict, fn, *args):
    """Call a method of the autoencoder with trained parameters."""
    with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
        return fn(*args)


@partial(jax.jit, static_argnums=(0, 4))
def log_weights(vae: Autoencoder, params: dict, x: jax.Array, rng_key: jax.Array, num: int) -> jax.Array:
    """Return ``log p(x, z) - log q(z | x)`` without log Z, ``(num, digits)``, for ``num`` guide draws per digit."""
    posterior = with_params(params, vae.posterior, x)

    def some(key):
        z = posterior.sample(key, (10,))
        joint = with_params(params, vae.pixels, z).log_prob(x) + with_params(params, vae.code).log_prob(z)
        return joint - posterior.log_prob(z)

    return jax.lax.map(some, jax.random.split(rng_key, num // 10)).reshape(-1, len(x))


def log_partition(vae: Autoencoder, params: dict, draws: np.ndarray, num: int) -> tuple[float, float, float]:
    """Return log Z by importance sampling around the prior's own draws, its standard error, and the effective share."""
    if vae.prior == "normal":
        return 0.0, 0.0, 1.0
    code = with_params(params, vae.code)
    log_z = ebm.log_partition(jax.random.key(4), code, method="importance", data=draws, num_samples=num)
    return float(log_z.value), float(log_z.standard_error), float(log_z.ess) / num


def draw_codes(vae: Autoencoder, params: dict, args: argparse.Namespace) -> np.ndarray:
    """Draw codes from the prior."""
    key = jax.random.key(1)
    if vae.prior == "normal":
        return np.asarray(vae.base.sample(key, (args.draws,)))
    chains = 20
    draws = ebm.sample(
        key, with_params(params, vae.code), "nuts", num_warmup=200, num_samples=args.draws // chains, num_chains=chains
    )
    # Shuffle, so that draws from different chains, and so from different modes, are mixed.
    return np.random.default_rng(0).permutation(np.asarray(draws.get_samples()["x"]))


def evaluate(vae: Autoencoder, params: dict, splits, seed: int, args: argparse.Namespace) -> Result:
    """Compute the bound on held-out digits, and draw codes and images."""
    train_x, test_x = splits
    draws = draw_codes(vae, params, args)
    log_z, log_z_se, share = log_partition(vae, params, draws, args.proposals)
    weights = np.asarray(log_weights(vae, params, test_x, jax.random.key(2), args.particles), float) - log_z
    bound = logsumexp(weights, axis=0) - np.log(len(weights))
    row = {
        "seed": seed,
        "prior": vae.prior,
        "bound": bound.mean(),
        "se": np.hypot(bound.std() / np.sqrt(len(bound)), log_z_se),
        "elbo": weights.mean(),
        "log_z": log_z,
        "log_z_se": log_z_se,
        "share": share,
    }
    codes = np.asarray(with_params(params, vae.posterior, train_x).sample(jax.random.key(3)))
    images = np.asarray(jax.nn.sigmoid(with_params(params, lambda z: vae.pixels(z).base_dist.logits, draws[:100])))
    return Result(row, bound, codes, draws, images)


def print_table(rows: list[dict], gaps: list[tuple[int, float, float]]) -> None:
    print("\nHeld-out digits, nats per digit; higher is better.")
    print(f"{'seed':>4} {'prior':>7} {'bound':>8} {'se':>6} {'ELBO':>8} {'log Z':>7} {'se':>6} {'IS ESS':>7} {'train s':>8}")
    for row in rows:
        print(
            f"{row['seed']:4} {row['prior']:>7} {row['bound']:8.3f} {row['se']:6.3f} {row['elbo']:8.3f} "
            f"{row['log_z']:7.3f} {row['log_z_se']:6.3f} {row['share']:7.1%} {row['seconds']:8.1f}"
        )
    for seed, gap, se in gaps:
        print(f"seed {seed}: the energy prior gains {gap:.3f} nats per digit (standard error {se:.3f}, paired by digit)")
    print(
        "bound: importance-weighted bound of the log-likelihood; se: standard error over digits and of log Z;\n"
        "log Z, se, IS ESS: log Z of the energy prior, its standard error, and the effective share of its proposals."
    )


def draw_picture(path: Path, test_x, results: dict[str, Result], *, is_quick: bool) -> None:
    """Draw held-out digits, draws of both models, and codes of the data against draws of the prior."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
    for axis, (title, images) in zip(
        axes[0],
        [("held-out digits", np.asarray(test_x[:100]))] + [(f"{n} prior: draws", r.images) for n, r in results.items()],
        strict=True,
    ):
        axis.imshow(images.reshape(10, 10, 8, 8).transpose(0, 2, 1, 3).reshape(80, 80), cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=title, xticks=np.arange(7.5, 80, 8), yticks=np.arange(7.5, 80, 8), xticklabels=[], yticklabels=[])
        axis.tick_params(length=0)
        axis.grid(color="0.9", lw=0.5)
    for axis, (name, result) in zip(axes[1, 1:], results.items(), strict=True):
        centre = result.codes.mean(0)
        directions = np.linalg.svd(result.codes - centre, full_matrices=False)[2][:2]
        for values, colour, label in ((result.draws, "C3", "prior"), (result.codes, "C0", "digits' codes")):
            flat = (values[: len(result.codes)] - centre) @ directions.T
            axis.plot(*flat.T, ".", ms=2, color=colour, alpha=0.5, label=label)
        axis.set(title=f"{name} prior: codes", xticks=[], yticks=[], xlabel="two main directions of the codes")
        axis.legend(markerscale=4, loc="upper right")
    bounds = [result.bound for result in results.values()]
    axes[1, 0].hist(bounds[1] - bounds[0], 30, color="0.7")
    axes[1, 0].axvline(0, color="k", lw=0.8, ls="--")
    axes[1, 0].axvline(np.mean(bounds[1] - bounds[0]), color="C3")
    axes[1, 0].set(title="gain of the energy prior", xlabel="nats per digit (line: mean)", yticks=[])
    if is_quick:
        figure.text(0.5, 0.5, "untrained (--quick)", ha="center", va="center", rotation=20, fontsize=36, alpha=0.35)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", choices=ESTIMATORS, default="pcd", help="how the energy prior is trained")
    parser.add_argument("--dim", type=int, default=8, help="dimension of the code")
    parser.add_argument("--steps", type=int, default=3000, help="updates of each model")
    parser.add_argument("--rate", type=float, default=2e-3, help="initial learning rate of Adam")
    parser.add_argument("--seeds", type=int, default=2, help="number of pairs of models to train")
    parser.add_argument("--particles", type=int, default=1000, help="draws per digit in the bound")
    parser.add_argument("--draws", type=int, default=10_000, help="codes drawn from each prior")
    parser.add_argument("--proposals", type=int, default=200_000, help="proposals for log Z")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for latent_prior.png")
    parser.add_argument("--quick", action="store_true", help="run small, to check that everything works")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.steps, args.seeds, args.particles, args.draws, args.proposals = 100, 1, 50, 200, 2000
    splits = load()
    rows, gaps, results = [], [], {}
    for seed in range(args.seeds):
        results = {}
        for prior in ("normal", "energy"):
            vae = Autoencoder(prior, args.dim, seed)
            params, seconds = train(vae, splits[0], seed, args)
            results[prior] = evaluate(vae, params, splits, seed, args)
            rows.append({**results[prior].row, "seconds": seconds})
        gap = results["energy"].bound - results["normal"].bound
        gaps.append((seed, gap.mean(), np.hypot(gap.std() / np.sqrt(len(gap)), rows[-1]["log_z_se"])))
    print_table(rows, gaps)
    draw_picture(args.out / "latent_prior.png", splits[1], results, is_quick=args.quick)
    print(f"picture: {args.out / 'latent_prior.png'}")
    return rows


if __name__ == "__main__":
    main()
