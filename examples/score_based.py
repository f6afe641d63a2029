"""A score-based generative model of digits: trained over all noise levels, sampled in two ways, scored by likelihood.

The data are the digits of scikit-learn (8 x 8 pixels of 17 grey levels), with added uniform noise as wide as one level, so
that they have a density. A small residual network gives the score at each noise level; "multiscale_dsm" trains it over the
levels of a variance-exploding process (Song and Ermon 2019; Song et al. 2021; Song and Kingma 2021, section 4.3). Then

* annealed Langevin draws digits, and completes lower halves given upper ones;
* the probability flow draws digits, and gives the exact log-likelihood of held-out ones: bits per pixel of 17 grey levels,
  beside a Gaussian and a Gaussian mixture fitted to the same digits. (With p the density of digits in units of x, where one
  level is WIDTH wide, a pixel costs at most -log2(p WIDTH^64) / 64 bits on average over the added noise.)

    python examples/score_based.py                 the table and the picture, about three minutes
    python examples/score_based.py --quick         seconds, to check that it runs
"""

import argparse
import time
from pathlib import Path

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
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402

PIXELS = 64
WIDTH = 1 / 8  # width of a grey level: x runs from -1 to 1.125
SPREAD = 0.75  # about the standard deviation of x over all pixels
PROCESS = ebm.VE(0.01, 10.0)
FREQUENCIES = np.geomspace(0.25, 8.0, 8).astype(np.float32)
UPPER = jnp.arange(PIXELS) < PIXELS // 2
MIXTURES = [("full", 5), ("full", 10), ("diag", 40), ("diag", 80), ("diag", 160)]


class Score(nnx.Module):
    """A residual network in the form of Karras et al. (2022), whose inputs and targets all have unit size."""

    def __init__(self, hidden: int, blocks: int, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.first = nnx.Linear(PIXELS, hidden, rngs=rngs)
        self.level = nnx.Linear(2 * len(FREQUENCIES), hidden, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(hidden, rngs=rngs) for _ in range(blocks)])
        self.ins = nnx.List([nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(blocks)])
        self.outs = nnx.List([nnx.Linear(hidden, hidden, kernel_init=zeros, rngs=rngs) for _ in range(blocks)])
        self.last = nnx.Linear(hidden, PIXELS, kernel_init=zeros, rngs=rngs)

    def __call__(self, x, sigma):
        """Return the score of one image with added noise of scale sigma: (clean - x) / sigma^2."""
        total = jnp.sqrt(SPREAD**2 + sigma**2)
        phase = FREQUENCIES * jnp.log(sigma)
        level = self.level(jnp.concatenate([jnp.sin(phase), jnp.cos(phase)]))
        h = self.first(x / total)
        for norm, into, out in zip(self.norms, self.ins, self.outs, strict=True):
            h = h + out(nnx.silu(into(norm(h)) + level))
        return (SPREAD / sigma * self.last(nnx.silu(h)) - x / total) / total


def load() -> tuple[np.ndarray, np.ndarray]:
    """Load grey levels of digits: 1437 for training, 360 held out."""
    digits = load_digits().data
    digits = digits[np.random.default_rng(0).permutation(len(digits))].astype(np.float32)
    return digits[:1437], digits[1437:]


def scaled(levels, noise):
    """Add noise to grey levels and scale them to the network's range."""
    return (levels + noise) * WIDTH - 1


def build(net, sampler=None):
    """Return the distribution of one image, declared at the smallest noise level."""
    return ebm.ScoreDistribution(net, (PIXELS,), context=jnp.asarray(PROCESS.sigma_min), sampler=sampler)


def make_model(module: Score):
    def model(levels, batch_size):
        net = nnx_module("net", module)
        with numpyro.plate("rows", len(levels), subsample_size=batch_size):
            batch = numpyro.subsample(levels, event_dim=1)
            noise = jax.random.uniform(numpyro.prng_key(), batch.shape)  # new at each update
            numpyro.sample("x", build(net), obs=scaled(batch, noise))

    return model


def train(module: Score, levels, args) -> tuple[dict, np.ndarray, float]:
    """Return parameters (averaged over the last updates), losses per digit, and seconds."""
    estimated = ebm.estimate(make_model(module), "multiscale_dsm", process=PROCESS)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.steps // 20, args.steps, 1e-5)
    svi = SVI(estimated, ebm.empty_guide, optax.adamw(rate, weight_decay=args.decay), Trace_ELBO())
    chunk = max(args.steps // 50, 1)

    @jax.jit
    def run(carry):
        def step(carry, _):
            state, average = carry
            state, loss = svi.update(state, levels, args.batch)
            average = jax.tree.map(lambda a, new: a + (new - a) / args.average, average, svi.get_params(state))
            return (state, average), loss / len(levels)

        return jax.lax.scan(step, carry, None, length=chunk)

    start = time.time()
    state = jax.jit(lambda key: svi.init(key, levels, args.batch))(jax.random.key(args.seed))
    carry, losses = (state, svi.get_params(state)), []
    with tqdm(range(0, args.steps, chunk), desc="score", unit="chunk", leave=False) as bar:
        for _ in bar:
            carry, loss = run(carry)
            losses.append(np.asarray(loss))
            bar.set_postfix_str(f"loss {losses[-1].mean():.2f}")
    return carry[1], np.concatenate(losses), time.time() - start


def trained(module: Score, params: dict, sampler=None):
    """Return the distribution with trained parameters."""
    with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
        return build(nnx_module("net", module), sampler)


def law_at_the_end(x: np.ndarray) -> dist.Distribution:
    """Return the distribution of the data plus noise of the largest level, with the data approximated by a Gaussian."""
    scale = np.sqrt(x.var() + PROCESS.sigma_max**2)
    return dist.Normal(jnp.full(PIXELS, x.mean()), scale).to_event(1)


def bits(log_density) -> np.ndarray:
    """Convert log densities of x in nats to bits per pixel of grey levels, one value per digit."""
    return -np.asarray(log_density, float) / (PIXELS * np.log(2)) - np.log2(WIDTH)


def baselines(x: np.ndarray, test: np.ndarray) -> list[dict]:
    """Evaluate a Gaussian, and the mixture that is best on a tenth of the training digits."""
    cut = len(x) // 10

    def mixture(kind, num, data):
        # reg_covar=1e-3 was the best value between 1e-5 and 1e-2 for the mixtures.
        return GaussianMixture(num, covariance_type=kind, reg_covar=1e-3, random_state=0).fit(data.astype(float))

    kind, num = max(MIXTURES, key=lambda spec: mixture(*spec, x[cut:]).score(x[:cut].astype(float)))
    fits = {"gaussian": mixture("full", 1, x), f"mixture ({num} {kind})": mixture(kind, num, x)}
    return [summary(name, bits(fit.score_samples(test.astype(float)))) for name, fit in fits.items()]


def summary(name: str, values: np.ndarray) -> dict:
    return {"model": name, "bits": values.mean(), "se": values.std() / np.sqrt(len(values)), "digits": len(values)}


def likelihood(distribution, flow: ebm.ProbabilityFlow, test: np.ndarray) -> np.ndarray:
    """Return the bits per pixel of held-out digits, computed a few digits at a time."""
    parts = np.array_split(test, max(len(test) // 60, 1))
    values = [flow.log_prob(distribution, part) for part in tqdm(parts, desc="likelihood", leave=False)]
    return bits(np.concatenate(values))


def print_table(rows: list[dict], seconds: dict[str, float]) -> None:
    print("\nHeld-out digits, bits per pixel of 17 grey levels (log2 17 = 4.09 for uniform levels); lower is better.")
    print(f"{'model':>20} {'bits/pixel':>11} {'se':>7} {'digits':>7}")
    for row in rows:
        print(f"{row['model']:>20} {row['bits']:11.4f} {row['se']:7.4f} {row['digits']:7}")
    print("se: standard error over digits. Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))


def tiles(images, columns: int) -> np.ndarray:
    """Arrange images ``(n, 64)`` side by side, in rows of ``columns``, with a light frame."""
    images = np.asarray(images, float).reshape(-1, columns, 8, 8)
    framed = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    return framed.transpose(0, 2, 1, 3).reshape(9 * len(images), 9 * columns)[:-1, :-1]


def draw_picture(path: Path, real, langevin, flow, trajectory, sigmas, halves, completions, *, is_quick) -> None:
    """Draw held-out digits and draws, draws at decreasing noise levels, and completions of upper halves."""
    figure = plt.figure(figsize=(13, 9.6), layout=ConstrainedLayoutEngine(h_pad=0.12))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    cmap = plt.get_cmap("gray_r").with_extremes(bad="0.8")

    def show(axis, images, columns, title):
        axis.imshow(tiles(images, columns), cmap=cmap, vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=10)

    for axis, (title, images) in zip(
        top.subplots(1, 3),
        (("held-out digits", real), ("annealed Langevin", langevin), ("probability flow", flow)),
        strict=True,
    ):
        show(axis, images, int(np.sqrt(len(images))), title)
    left, right = bottom.subplots(1, 2, width_ratios=[1.35, 1])
    # Scale each level by its own spread, so that images at large levels are visible.
    shown = np.asarray(trajectory) * SPREAD / np.sqrt(SPREAD**2 + np.asarray(sigmas)[:, None, None] ** 2)
    show(left, np.swapaxes(shown, 0, 1), len(sigmas), "annealed Langevin at noise levels (scaled)")
    left.set_xticks(9 * np.arange(len(sigmas)) + 3.5, [f"{s:.2g}" for s in sigmas], fontsize=8)
    left.set_xlabel("sigma")
    hidden = np.where(UPPER, halves, np.nan)
    shown = np.concatenate([np.asarray(halves)[None], hidden[None], np.asarray(completions)])
    show(right, np.swapaxes(shown, 0, 1), len(shown), "held-out digit, its given half, completions")
    if is_quick:
        figure.text(0.5, 0.5, "untrained (--quick)", ha="center", va="center", rotation=20, fontsize=36, alpha=0.35)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="updates")
    parser.add_argument("--batch", type=int, default=256, help="digits per update")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate of Adam")
    parser.add_argument("--decay", type=float, default=1e-2, help="weight decay")
    parser.add_argument("--average", type=int, default=500, help="updates over which parameters are averaged")
    parser.add_argument("--hidden", type=int, default=256, help="width of the network")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks")
    parser.add_argument("--levels", type=int, default=34, help="noise levels of annealed Langevin")
    parser.add_argument("--steps-per-level", type=int, default=30, help="steps of annealed Langevin at each level")
    parser.add_argument("--draws", type=int, default=100, help="digits drawn by each sampler (a square number)")
    parser.add_argument("--test-rows", type=int, default=360, help="held-out digits whose likelihood is computed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for score_based.png")
    parser.add_argument("--quick", action="store_true", help="run for seconds, to check that everything works")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.steps, args.hidden, args.blocks, args.average = 200, 32, 1, 20
        args.levels, args.steps_per_level, args.draws, args.test_rows = 12, 3, 4, 4

    train_levels, test_levels = load()
    rng = np.random.default_rng(1)
    x, test = (scaled(part, rng.random(part.shape, np.float32)) for part in (train_levels, test_levels))
    module = Score(args.hidden, args.blocks, nnx.Rngs(args.seed))
    params, losses, seconds = train(module, jnp.asarray(train_levels), args)
    tenth = max(len(losses) // 10, 1)
    print(f"loss per digit: {losses[:tenth].mean():.2f} over the first tenth, {losses[-tenth:].mean():.2f} over the last")

    start = time.time()
    flow = ebm.ProbabilityFlow(PROCESS, prior=law_at_the_end(x))
    distribution = trained(module, params, flow)
    rows = baselines(x, test)
    rows.append(summary("score", likelihood(distribution, flow, test[: args.test_rows])))
    print_table(rows, {"training": seconds, "likelihood": time.time() - start})

    sigmas = ebm.geometric_sigmas(PROCESS.sigma_max, PROCESS.sigma_min, args.levels)
    langevin = ebm.AnnealedLangevin(sigmas, args.steps_per_level)
    shape, keys = (args.draws,), jax.random.split(jax.random.key(2), 4)
    strip = np.unique(np.linspace(0, args.levels - 1, 12).round().astype(int))
    trajectory = langevin.trajectory(keys[0], distribution, (8,))[strip]
    halves = test[:8]
    completions = langevin.inpaint(keys[1], distribution, halves, UPPER, (6,))
    draws = langevin(keys[2], distribution, shape), distribution.sample(keys[3], shape)
    path = args.out / "score_based.png"
    draw_picture(path, test[: args.draws], *draws, trajectory, sigmas[strip], halves, completions, is_quick=args.quick)
    print(f"Wrote {path}.")
    return rows


if __name__ == "__main__":
    main()
