"""Runs the public surface on valid inputs while beartype checks every annotation of the package; test_types.py starts it.

The hook of jaxtyping has to be in place before the package is imported, and the other tests pass wrong types on purpose, so
this runs in a process of its own.
"""

import sys
import warnings

from jaxtyping import install_import_hook

hook = install_import_hook("numpyro_ebm", "typed_checker.check")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from energy_cases import AUTOLOGISTIC, COVARIATES, ENERGIES, states_of
from estimator_cases import CASES, OTHERS, continuous_options
from flax import nnx
from helpers import vector_model
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm
from numpyro_ebm import bayes
from numpyro_ebm.kernels.names import KERNELS

hook.uninstall()

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
PARAMS = {"t": np.ones(2, np.float32)}


def target():
    return ebm.EnergyDistribution(lambda x: 0.5 * (x @ x), (2,), base=dist.Normal(0, 2).expand([2]).to_event(1))


def update(model, *args, **options):
    """One update by an estimator, compiled."""
    svi = SVI(ebm.estimate(model, **options), ebm.empty_guide, optax.sgd(1e-3), Trace_ELBO())
    state, _ = jax.jit(svi.update)(svi.init(KEY, *args), *args)
    return jax.block_until_ready(state)


def estimators():
    for name in CASES:
        update(vector_model, ROWS, estimator=name, **continuous_options("x", (2,))[name])
    for name, other in OTHERS.items():
        update(other.model, other.data[:24], estimator=name, **other.options)
    units, rows = OTHERS["pseudolikelihood"].model, OTHERS["pseudolikelihood"].data[:24]
    of_units = {"nce": {"noise": "marginals"}, "cd": {"kernel": "dmala"}, "pcd": {"kernel": "gwg"}, "exact": {}}
    of_units |= {"generalized_sm": {}, "energy_discrepancy": {"noise": "absorbing"}, "pseudolikelihood": {"block_size": 2}}
    of_units |= {"unbiased": {"num_chains": 8}}
    for name, options in of_units.items():
        update(units, rows, estimator=name, **options)
    update(units, np.where(np.arange(rows.size).reshape(rows.shape) % 7 == 0, np.nan, rows), estimator="exact")


def declarations():
    conditional = lambda x, c: 0.5 * (x @ x) + c["shift"] @ x  # noqa: E731

    def per_row(x, c, mask):
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
            d = ebm.EnergyDistribution(conditional, (2,), context={"shift": c}, base=dist.Normal(0, c).to_event(1))
            numpyro.sample("x", d, obs=x)

    methods = dict.fromkeys(("cd", "pcd", "ranking_nce"), {}) | {"dsm": {"sigma": 0.1}, "sm": {"num_probes": 2}}
    for name, options in methods.items():
        update(per_row, ROWS, abs(ROWS) + 0.5, ROWS[:, 0] > 0, estimator=name, **options)

    def scores(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.ScoreDistribution(lambda x: -x * numpyro.param("t", np.ones(2)), (2,)), obs=x)

    update(scores, ROWS, estimator="ssm_vr")

    def joint(x, y):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0, 1), obs=x)
            numpyro.sample("y", dist.Normal(0, 1).expand([2]).to_event(1), obs=y)
            ebm.energy_factor("f", lambda x, y: numpyro.param("t", 0.3) * x * y.sum(), x=x, y=y)

    update(joint, ROWS[:, 0], ROWS, estimator="dsm", sigma=0.1)
    update(joint, ROWS[:, 0], ROWS, estimator="pcd")

    def mixed(x, s):
        t = numpyro.param("t", jnp.zeros(3))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0, 1), obs=x)
            numpyro.sample("s", dist.Categorical(probs=np.ones(3) / 3), obs=s)
            ebm.energy_factor("f", lambda x, s: t[s] * x, x=x, s=s)

    for name in ("cd", "pcd", "replay", "mle", "energy_discrepancy", "pseudolikelihood"):
        update(mixed, ROWS[:, 0], np.arange(24) % 3, estimator=name)

    def hidden(x, categories):
        a, b = numpyro.param("a", jnp.zeros(3)), numpyro.param("b", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.Normal(0, 1), obs=x)
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            s = numpyro.sample("s", dist.Categorical(probs=np.ones(3) / 3), obs=categories)
            ebm.energy_factor("f", lambda x, s, z: a[s] * x + 0.5 * (z - x) ** 2 + b * z**2, x=x, s=s, z=z)

    holes = np.arange(24) % 5 == 0
    some = np.where(holes, np.nan, ROWS[:, 0])
    fixed = ebm.PositivePhase({"z": ebm.HMC(0.3), "x": "mala"}, 2, adapt_step_size=False)
    for name, phase in {"cd": ebm.PositivePhase(num_steps=2), "pcd": fixed}.items():
        update(hidden, some, np.where(holes, np.nan, np.arange(24) % 3), estimator=name, positive_phase=phase)

    def latent(x):
        scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x, s: 0.5 * (x @ x) / s**2, (2,), context=scale), obs=x)

    model = ebm.estimate(latent, "cd")
    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    svi.update(svi.init(KEY, ROWS), ROWS)
    d = ebm.EnergyDistribution(conditional, (2,), context={"shift": ROWS}, base=ebm.Empirical(ROWS + 0.1))
    bounded = ebm.EnergyDistribution(lambda x: x.sum(), (3,), support=dist.constraints.simplex)
    bounded.log_prob(bounded.sample(jax.random.PRNGKey(0), (4, 2)))
    d.expand([24]).to_event(1).mask(False)
    factor = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
    jax.vmap(factor.log_prob)(np.arange(3.0))


def samplers():
    def energy(x, sigma=0.0):
        return 0.5 * (x @ x) / (1 + sigma**2)

    for sampler in (
        ebm.ChainSampler("mala", num_warmup=5, num_steps=5),
        ebm.ReverseSDE(ebm.VE(0.1, 3.0), 5),
        ebm.ReverseSDE(ebm.VP(), 5),
        ebm.AnnealedLangevin(ebm.geometric_sigmas(3.0, 0.1, 4), steps_per_sigma=2),
        ebm.ProbabilityFlow(ebm.VE(0.1, 3.0)),
    ):
        context = None if isinstance(sampler, ebm.ChainSampler) else np.float32(0.1)
        d = ebm.EnergyDistribution(energy, (2,), context=context, sampler=sampler)
        draws = d.sample(KEY, (3,))
        if isinstance(sampler, ebm.ProbabilityFlow):
            sampler.log_prob(d, draws)
        if isinstance(sampler, ebm.AnnealedLangevin):
            sampler.trajectory(KEY, d, (3,))
            sampler.inpaint(KEY, d, draws, np.array([True, False]))


def kernels():
    of_energies, of_integers = {"block_gibbs", "swendsen_wang"}, {"lattice_walk"}
    discrete = {name for name, cls in KERNELS.classes.items() if cls.is_discrete is True} - of_energies - of_integers
    for name in sorted(set(KERNELS.classes) - discrete - of_energies - of_integers - {"elliptical_slice"}):
        ebm.sample(KEY, target(), name, num_warmup=5, num_samples=5, num_chains=2)
    supports = {"units": (3,), "spins": (3,), "categories": (2, 3)}
    for kind, support in zip(supports, (dist.constraints.boolean, ebm.spins, ebm.one_hot), strict=True):
        for name in sorted(discrete):
            d = ebm.EnergyDistribution(lambda x: 0.1 * x.sum(), supports[kind], support=support)
            ebm.sample(KEY, d, name, num_warmup=3, num_samples=3, num_chains=2)
    lattice = ebm.EnergyDistribution(ebm.energies.Ising(ebm.energies.Graph.lattice(2, 3), 0.3))
    for name in sorted(of_energies):
        ebm.sample(KEY, lattice, name, num_warmup=3, num_samples=3, num_chains=2)
        ebm.sample(KEY, lattice, ebm.ParallelTempering(name), num_warmup=3, num_samples=3, num_chains=2)
        ebm.log_partition(KEY, lattice, method="ais", kernel=name, num_levels=5, num_chains=10)
    ebm.sample(KEY, ebm.EnergyDistribution(ebm.energies.GaussianRBM(np.ones((2, 1)))), "block_gibbs", num_samples=3)
    parts = (dist.constraints.positive, ebm.spins)
    mixed = ebm.EnergyDistribution(lambda e: e[0] - 0.1 * e[1], (2,), support=ebm.Blocks(("x", "s"), parts, ((), ())))
    for kernel in (None, {"x": "mala", "s": "flips"}):
        ebm.sample(KEY, mixed, kernel, num_warmup=3, num_samples=3, num_chains=2)
    pair = ebm.EnergyDistribution(ebm.energies.PoissonGraphicalModel([(0, 1)], -0.3))
    plain = ebm.EnergyDistribution(lambda x: (x * x).sum(), (2, 2), support=dist.constraints.positive_integer)
    counts = ebm.Blocks(("x", "n"), (dist.constraints.real, dist.constraints.nonnegative_integer), ((), ()))
    for d in (pair, plain, ebm.EnergyDistribution(lambda e: e @ e, (2,), support=counts)):
        ebm.sample(KEY, d, num_warmup=3, num_samples=3, num_chains=2)
        ebm.log_partition(KEY, d, method="ais", num_levels=5, num_chains=10)
    ebm.sample(KEY, plain, ebm.LatticeWalk(2.0, num_moves=3), num_warmup=3, num_samples=3, num_chains=2)
    normal = dist.Normal(0, 2).expand([2]).to_event(1)
    tilted = ebm.EnergyDistribution(lambda x: 0.1 * (x @ x), (2,), base=normal)
    ebm.sample(KEY, tilted, "elliptical_slice", num_warmup=5, num_samples=5, num_chains=2)

    def both():
        numpyro.sample("s", lattice)
        numpyro.sample("z", dist.Normal())

    for by_site in (None, {"s": "gibbs", "z": "mala"}):
        ebm.sample(KEY, both, by_site, num_warmup=5, num_samples=5, num_chains=2)

    def model():
        numpyro.sample("x", target())

    mcmc = MCMC(ebm.BlackJAXKernel(model, "mala"), num_warmup=5, num_samples=20, progress_bar=False)
    mcmc.run(KEY)
    ebm.to_arviz(mcmc)


def log_partitions():
    data = np.asarray(target().base.sample(KEY, (40,)))
    for method, options in {
        "ais": {"num_levels": 5, "num_chains": 8},
        "smc": {"num_particles": 50},
        "importance": {"data": data},
        "bridge": {"draws": data},
        "nce": {"data": data},
        "grid": {"num_points": 31},
    }.items():
        ebm.log_partition(KEY, target(), method=method, **options)
    ebm.log_partition_bounds(KEY, target(), num_levels=5, num_chains=8)


def training():
    svi = SVI(ebm.estimate(vector_model, "pcd"), ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    result = ebm.fit(KEY, svi, 8, ROWS, check_every=4, record_chains=3, progress_bar=False)
    str(ebm.training_report(svi.model, result, ROWS))
    str(ebm.diagnose(svi.model, result, ROWS))
    ebm.to_arviz(result)
    objective = ebm.estimate(vector_model, "sm")
    svi = SVI(objective, ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    ebm.fit(KEY, svi, 8, ROWS, held_out=(ROWS[:12],), check_every=4, progress_bar=False)
    ebm.standard_errors(KEY, objective, PARAMS, ROWS)


def evaluation():
    models = {"energy": (vector_model, PARAMS), "normal": dist.Normal(0, 1).expand([2]).to_event(1)}
    str(ebm.evaluate(KEY, models, ROWS, num_draws=40, log_partition="grid", measures=("log_likelihood", "sm", "ksd", "mmd")))
    log_z = ebm.log_partition(None, vector_model, method="grid", params=PARAMS, model_args=(ROWS,))
    ebm.log_likelihood(vector_model, PARAMS, ROWS, log_partition=log_z)


def tests_of_draws():
    draws = np.random.default_rng(1).normal(size=(2, 40, 2)).astype(np.float32)
    ebm.classifier_two_sample_test(KEY, draws[0], draws[1], num_permutations=5)
    ebm.mode_weights(lambda x: x[0] > 0, draws, ROWS)
    ebm.split_rhat({"x": draws}, {"first": lambda x: x[0]})
    ebm.nested_rhat({"x": np.concatenate([draws, draws + 0.1])}, 2)
    ebm.ksd_test(KEY, target(), ROWS)
    ebm.mmd(KEY, draws[0], ROWS)
    ebm.sm_loss((vector_model, PARAMS), ROWS)


def figures():
    import matplotlib

    matplotlib.use("Agg")
    from numpyro_ebm import plots

    draws = ebm.sample(KEY, target(), "mala", num_warmup=5, num_samples=20, num_chains=2)
    plots.plot_energy(target(), data=ROWS, draws=draws)
    plots.plot_pairs(ROWS, draws)
    plots.plot_marginals(ROWS, draws)
    plots.plot_rank(draws)
    plots.plot_trace(draws)
    plots.plot_images(np.random.default_rng(0).normal(size=(5, 4, 4)))
    plots.plot_noise_levels(ebm.geometric_sigmas(3.0, 0.1, 5), ROWS)
    plots.plot_annealing(ebm.log_partition_bounds(KEY, target(), num_levels=5, num_chains=8))
    svi = SVI(ebm.estimate(vector_model, "pcd"), ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    plots.plot_training(ebm.fit(KEY, svi, 8, ROWS, check_every=4, progress_bar=False))
    estimated = ebm.estimate(vector_model, "nce")
    svi = SVI(estimated, ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    result = ebm.fit(KEY, svi, 8, ROWS, progress_bar=False)
    plots.plot_calibration(*plots.log_ratios(KEY, estimated, result, ROWS))


def energies():
    for energy in ENERGIES.values():
        d, _, states = states_of(energy)
        x = jax.numpy.asarray(states[3])
        some = np.array([[1, 0]])
        energy(x)
        energy.scaled(0.5)
        if energy.has_conditionals:
            for index in (None, some, jax.numpy.asarray(1)):
                energy.conditional_logits(x, index)
        if energy.has_sweep:
            energy.sweep(KEY, x)
        if energy.num_terms is not None:
            energy.log_partition()
        d.sample(KEY, (2,))
    mixture = ENERGIES["mixture"]
    mixture.log_shares()
    mixture.log_responsibilities(jax.numpy.ones(5))
    models = {
        ebm.energies.GaussianGraphicalModel(np.eye(2)): (0.5, -1.0),
        ebm.energies.PoissonGraphicalModel([(0, 1)], -0.1): (2, 0),
        ebm.energies.ExponentialGraphicalModel([(0, 1)], 0.1): (0.5, 1.0),
    }
    for energy, event in models.items():
        x = jax.numpy.asarray(event)
        energy.conditional(x, some).sample(KEY)
        energy.sweep(KEY, x)
    dyads = ebm.energies.Dyads(4)
    covariates = [ebm.energies.NodeCovariate(np.arange(4.0)), ebm.energies.EdgeCovariate(np.ones((4, 4)))]
    y = dyads.from_adjacency(np.ones((2, 4, 4), int) - np.eye(4, dtype=int))
    dyads.to_adjacency(y)
    network = ebm.energies.ERGM(dyads, covariates, np.zeros(2))
    network.values(y[0])
    network.changes(y[0], some)
    ebm.energies.Network(y[0], dyads).with_tie(0, 1, 0)[:]
    d = ebm.EnergyDistribution(AUTOLOGISTIC, context=np.stack([COVARIATES] * 2), batch_shape=(2,))
    d.log_prob(d.sample(KEY))
    ebm.log_partition(None, d, method="enumerate")


def posteriors():
    graph = ebm.energies.Graph.lattice(2, 2)
    couplings = {"J": (-0.5, 0.5, 5), "h": (-0.5, 0.5, 5)}
    log_z = ebm.bayes.log_partition_grid(None, lambda J, h: ebm.energies.Ising(graph, J, h), couplings)  # noqa: N803
    repr(log_z)
    log_z(J=0.1, h=np.zeros(3))
    log_z.error(J=[0.1, 0.2], h=0.0)
    log_z.distribution(J=0.1, h=np.zeros(3, np.float32)).sample(KEY)
    log_z.distribution(J=0.1, h=0.0).log_prob(np.ones((2, 2)))
    gaussian = lambda t: ebm.EnergyDistribution(lambda x: t * x**2)  # noqa: E731
    options = {"num_levels": 5, "num_chains": 20}
    ebm.bayes.log_partition_grid(KEY, gaussian, {"t": (0.5, 1.0, 5)}, method="ais", **options)

    def model(s):
        J = numpyro.sample("J", dist.Uniform(-0.5, 0.5))  # noqa: N806
        numpyro.sample("s", log_z.distribution(J=J, h=0.0), obs=s)

    def energy():
        J = numpyro.sample("J", dist.Uniform(-0.5, 0.5))  # noqa: N806
        numpyro.sample("s", ebm.EnergyDistribution(ebm.energies.Ising(graph, J)))

    draws = {"J": np.linspace(-0.4, 0.4, 20)}
    rows = np.ones((2, 2), np.float32)
    ebm.log_partition(None, energy, posterior_samples=draws, method="enumerate")
    ebm.bayes.log_evidence(None, model, method="grid", num_points=101, model_args=(rows,))
    ebm.bayes.log_evidence(KEY, model, method="bridge", posterior_samples=draws, model_args=(rows,))


def generalised_posteriors():
    def model(x):
        t, b = numpyro.sample("t", dist.Normal(1, 2)), numpyro.sample("b", dist.Normal(0, 2).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * (x @ x) - b @ x, (2,)), obs=x)

    latents = {"t": np.ones((2, 3), np.float32), "b": np.zeros((2, 3, 2), np.float32)}
    chains = bayes.Simulated("mala", num_steps=3, num_sets=4)
    exact = bayes.Simulated(exact_sampler=lambda key, z: jax.random.normal(key, (24, 2)), num_sets=4)
    methods = ("sandwich", bayes.Bootstrap(3), bayes.Bootstrap(exact), bayes.OpenFaced(chains), bayes.Rescaling(exact))
    for method in (*methods, bayes.Curvature(exact, num_newton_steps=3), lambda key, problem: bayes.Adjustment(0.5)):
        found = ebm.calibrate(KEY, ebm.estimate(model, "sm"), ROWS, method=method)
        found.adjust(latents)
    ebm.calibrate(KEY, ebm.estimate(model, "ksd"), ROWS)
    fixed = {"noise": "gaussian", "noise_seed": 0}
    labels = ebm.estimate(model, "nce", log_normalizer=dist.Normal(0, 10), **fixed)
    ebm.calibrate(KEY, labels, ROWS, method="open_faced").adjust(latents | {"x$log_normalizer": np.zeros((2, 3))})
    ebm.calibrate(KEY, ebm.estimate(model, "ranking_nce", **fixed), ROWS)
    posterior = ebm.gaussian_posterior(ebm.estimate(model, "sm", weight=np.float32(0.5)), ROWS)
    posterior.sample(KEY, (2, 3))
    _ = posterior.standard_deviation


def posterior_kernels():
    class Tilt(nnx.Module):
        def __init__(self):
            self.mean = nnx.Param(jnp.zeros(2))

        def __call__(self, x):
            return 0.5 * x @ x - self.mean[...] @ x

    def model(x):
        energy = ebm.random_module("net", Tilt(), {"mean": dist.Normal(0, 3)})
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,)), obs=x)

    def run(kernel, num_chains=1):
        counts = {"num_warmup": 3, "num_samples": 8, "num_chains": num_chains}
        mcmc = MCMC(kernel, **counts, chain_method="vectorized", progress_bar=False)
        mcmc.run(KEY, ROWS)
        return mcmc

    exact = {"exact_sampler": lambda key, z: z["net/mean"] + jax.random.normal(key, ROWS.shape), "num_newton_steps": 2}
    chains = {"num_steps": 2, "num_newton_steps": 2}
    for proposal in ("random_walk", bayes.NoisyMALA(num_gradient_draws=2), bayes.CrankNicolson(0.3)):
        run(ebm.ExchangeKernel(model, "mala", proposal=proposal, num_bridges=1, **chains))
    ebm.diagnose(run(ebm.ExchangeKernel(model, {"x": "mala"}, **chains), num_chains=4))
    run(ebm.ExchangeKernel(model, proposal="differences", **exact), num_chains=4)
    run(bayes.AuxiliaryVariableKernel(model, **exact), num_chains=2)
    ebm.diagnose(run(bayes.NoisyLangevinKernel(model, persistent=True, num_gradient_draws=2, **chains), num_chains=2))
    run(bayes.NoisyLangevinKernel(model, step_size=0.1, temperature=0.9, **exact))


def edges_of_networks():
    def model(x):
        half = dist.Categorical(probs=np.array([0.5, 0.5]))
        prior = dist.MixtureGeneral(half, [dist.Normal(0, 0.1), dist.Cauchy(0, 2.5)])
        is_in = numpyro.sample("is_in", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(is_in * numpyro.sample("s", prior.expand([2]).to_event(1)).sum(), 1), obs=x)

    draws = {"s": np.ones((2, 5, 2), np.float32), "is_in": np.zeros((2, 5), int)}
    found = bayes.inclusion_probabilities(model, draws, 0.5, names={"s": ["a - b", "a - c"]})
    str(found)
    bayes.inclusion_probabilities(model, draws, x=0.5)


STOPS = (
    posteriors,
    estimators,
    energies,
    declarations,
    kernels,
    samplers,
    log_partitions,
    training,
    evaluation,
    tests_of_draws,
    figures,
    generalised_posteriors,
    posterior_kernels,
    edges_of_networks,
)
TOUR = {each.__name__: each for each in STOPS}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TOUR[sys.argv[1]]()
    print("done")
