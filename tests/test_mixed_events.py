"""Events with discrete and continuous members: a Gaussian whose mean binary units shift, with everything in closed form.

p(x, s) ~ exp(-|x|^2 / 2 + x B s + b s + sum_{i<j} J_ij s_i s_j), where x given s is normal with mean B s.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from estimator_cases import CASES, OTHERS
from helpers import check_moments, fit, some_slow, surrogate
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.estimators.names import ESTIMATORS
from numpyro_ebm.kernels import chains

KEY = jax.random.key(0)
ROW, COLUMN = np.triu_indices(3, 1)
STATES = np.array(list(itertools.product((0, 1), repeat=3)))
TRUE = {
    "B": np.array([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]]),
    "b": np.array([0.2, -0.3, 0.1]),
    "J": np.array([0.6, -0.4, 0.5]),
}
ZERO = {name: jnp.zeros(value.shape) for name, value in TRUE.items()}
SUPPORT = ebm.Blocks(("x", "s"), (constraints.real, constraints.boolean), ((2,), (3,)))
TAKEN = {"cd", "pcd", "replay", "mle", "energy_discrepancy", "pseudolikelihood"}


def energy(x, s, t):
    return 0.5 * x @ x - x @ t["B"] @ s - t["b"] @ s - jnp.sum(t["J"] * s[ROW] * s[COLUMN])


def of_vector(event, t=None):
    return energy(event[:2], event[2:], TRUE if t is None else t)


def distribution(**options):
    return ebm.EnergyDistribution(of_vector, (5,), support=SUPPORT, **options)


def log_weights(t):
    """Log of the sum over x for each state of s, without log 2 pi."""
    mean = STATES @ t["B"].T
    return 0.5 * jnp.sum(mean**2, -1) + STATES @ t["b"] + (STATES[:, ROW] * STATES[:, COLUMN]) @ t["J"]


def draws(num, seed=0):
    rng = np.random.default_rng(seed)
    s = STATES[rng.choice(8, num, p=np.asarray(jax.nn.softmax(log_weights(TRUE))))]
    return s @ TRUE["B"].T + rng.normal(size=(num, 2)), s


X, S = draws(2000)


def improper(constraint, size):
    return dist.ImproperUniform(constraints.independent(constraint, 1), (), (size,))


def model(x, s, start=None):
    """The two members as sites that a factor joins."""
    t = {name: numpyro.param(name, jnp.asarray(value)) for name, value in (start or ZERO).items()}
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(constraints.real, 2), obs=x)
        s = numpyro.sample("s", improper(constraints.boolean, 3), obs=s)
        ebm.energy_factor("e", lambda x, s: energy(x, s, t), x=x, s=s)


@functools.cache
def maximum_likelihood():
    """The exact estimate and its standard errors, flat in the order of the names; the family is exponential."""
    start, unravel = ravel_pytree({name: jnp.asarray(value, float) for name, value in TRUE.items()})

    def loss(flat):
        t = unravel(flat)
        energies = jax.vmap(lambda x, s: energy(x, s, t))(X, S)
        return jnp.mean(energies) + jax.nn.logsumexp(log_weights(t))

    for _ in range(8):
        start = start - jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))
    return start, jnp.sqrt(jnp.diag(jnp.linalg.inv(jax.hessian(loss)(start))) / len(X))


def check_estimate(params):
    best, errors = maximum_likelihood()
    assert np.max(np.abs(ravel_pytree({name: params[name] for name in TRUE})[0] - best) / errors) < 3


def moments(x, s):
    """Sufficient statistics of rows."""
    return np.concatenate(
        [(x[..., :, None] * s[..., None, :]).reshape(*x.shape[:-1], 6), s, s[..., ROW] * s[..., COLUMN]], -1
    )


def exact_moments():
    """Their means and variances."""
    p, mean = np.asarray(jax.nn.softmax(log_weights(TRUE)), float), STATES @ TRUE["B"].T
    first = moments(mean, STATES)
    second = first**2
    second[:, :6] += np.repeat(STATES[:, None], 2, axis=1).reshape(8, 6)  # the variance of x, where s is 1
    return p @ first, p @ second - (p @ first) ** 2


KERNELS = [{"x": "mala", "s": "gibbs"}, {"x": ebm.HMC(0.4, 3), "s": "flips"}]


def lifted(kernel, rows):
    """Rows as a bound kernel moves them."""
    bound = ebm.BySite(kernel).bind(distribution())
    return bound, jax.vmap(bound.lift)(jnp.asarray(rows, float))


def test_a_bound_kernel_cuts_the_event_into_its_members():
    rows = np.concatenate([X[:3], S[:3]], axis=1)
    bound, position = lifted(KERNELS[0], rows)
    assert position["s"].dtype == jnp.int32
    np.testing.assert_allclose(position["x"], X[:3], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(bound.lower)(position), rows, rtol=1e-6)
    assert bound.continuous.tolist() == [True, True, False, False, False]
    assert bound.step_size == ebm.MALA().step_size
    assert bound.target_acceptance == ebm.MALA.target_acceptance


@pytest.mark.parametrize("kernel", some_slow(KERNELS[:1], KERNELS[1:]), ids=str)
@pytest.mark.slow
def test_kernels_by_member_keep_the_density(kernel):
    """Chains that start at exact draws still have the exact moments after a few transitions."""
    start, d = np.concatenate(draws(4000, seed=1), axis=1), distribution()
    bound, position = lifted(kernel, start)
    run = chains.advance(KEY, bound, d.target(bound), position, num_steps=5)
    ended = np.asarray(jax.vmap(bound.lower)(run.positions))
    assert set(np.unique(ended[:, 2:])) == {0.0, 1.0}
    assert np.mean(ended[:, 2:] != start[:, 2:]) > 0.3
    mean, variance = exact_moments()
    error = np.abs(moments(ended[:, :2], ended[:, 2:]).mean(0) - mean)
    assert np.all(error < 5 * np.sqrt(variance / len(ended)))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [None, *KERNELS], ids=str)
def test_sample_gives_the_exact_moments(kernel):
    found = ebm.sample(KEY, distribution(), kernel, num_warmup=300, num_samples=2000)
    x = np.asarray(found.samples["x"])
    check_moments(moments(x[..., :2], x[..., 2:]), *exact_moments())


@pytest.mark.slow
def test_the_distribution_draws_and_restarts_far_from_the_origin():
    d = ebm.EnergyDistribution(
        lambda e: jnp.where(jnp.abs(e[0] - 30.0) < 20.0, 0.5 * (e[0] - 30.0) ** 2 - e[1] * (e[0] - 30.0), jnp.inf),
        (2,),
        support=ebm.Blocks(("x", "s"), (constraints.real, ebm.spins), ((), ())),
        sampler=ebm.ChainSampler({"x": "mala", "s": "gibbs"}, num_warmup=100, num_steps=50),
    )
    x = np.asarray(d.sample(KEY, (1000,)))
    assert set(np.unique(x[:, 1])) == {-1.0, 1.0}
    error = (x[:, 0] - 30.0 - x[:, 1]).std() / np.sqrt(1000)  # x is normal about 30 + s
    assert abs(np.mean(x[:, 0] - 30.0 - x[:, 1])) < 5 * error
    assert abs(np.mean(x[:, 1])) < 5 / np.sqrt(1000)


def test_constrained_members_keep_their_jacobian_and_discrete_ones_have_none():
    support = ebm.Blocks(("s", "r", "p"), (ebm.spins, constraints.positive, constraints.simplex), ((2,), (2,), (3,)))
    d = ebm.EnergyDistribution(lambda e: jnp.sum(e**2), (7,), support=support)
    event = jnp.array([1.0, -1.0, 0.5, 2.0, 0.2, 0.3, 0.5])
    position = d.unconstrain(event)
    assert (d.is_mixed, d.is_discrete, d.is_continuous, d.unconstrained_shape) == (True, False, False, (6,))
    np.testing.assert_allclose(d.constrain(position), event, rtol=1e-6)
    simplex = dist.biject_to(constraints.simplex)
    expected = np.log(0.5 * 2.0) + simplex.log_abs_det_jacobian(position[4:], event[4:])
    np.testing.assert_allclose(d.log_jacobian(position), expected, rtol=1e-5)
    np.testing.assert_allclose(
        d.unconstrained_log_reference(position), dist.Normal().log_prob(position[2:]).sum() - 2 * np.log(2), rtol=1e-5
    )
    start = d.reference_sample(KEY, (4,))
    assert np.all(support(start))


def test_an_energy_gets_the_discrete_members_as_integers():
    table = jnp.array([0.0, 1.0, -0.5, 2.0])

    def categories(x, k):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.Normal(), obs=x)
            k = numpyro.sample("k", dist.Categorical(logits=jnp.array([0.1, 0.2, 0.3, 0.4])), obs=k)
            ebm.energy_factor("e", lambda x, k: -x * table[k], x=x, k=k)

    x, k = np.array([0.3, -1.0, 2.0]), np.array([3, 0, 1])
    value = surrogate(ebm.estimate(categories, "pseudolikelihood"), {}, x, k)
    prior = jax.nn.log_softmax(jnp.array([0.1, 0.2, 0.3, 0.4]))
    of_k = jax.nn.log_softmax(prior + x[:, None] * table, axis=1)[jnp.arange(3), k]
    np.testing.assert_allclose(value, jnp.sum(of_k + dist.Normal(table[k], 1.0).log_prob(x)), rtol=1e-5)


def closed_form(x, s, t):
    """Sum of the log conditionals of all elements: normal ones of x, logistic ones of s."""
    fields = t["b"] + x @ t["B"]
    couplings = np.zeros((3, 3))
    couplings[ROW, COLUMN] = couplings[COLUMN, ROW] = t["J"]
    of_s = jax.nn.log_sigmoid((2 * s - 1) * (fields + s @ couplings)).sum(-1)
    return dist.Normal(s @ t["B"].T, 1.0).log_prob(x).sum(-1) + of_s


def test_pseudolikelihood_in_closed_form():
    t = {name: value + 0.3 for name, value in TRUE.items()}
    value = surrogate(ebm.estimate(model, "pseudolikelihood"), t, X[:7], S[:7])
    np.testing.assert_allclose(value, closed_form(X[:7], S[:7], t).sum(), rtol=1e-5)
    keep = np.arange(7) != 2
    missing = np.where(keep[:, None], X[:7], np.nan)
    masked = handlers.mask(model, mask=keep)
    value = surrogate(ebm.estimate(masked, "pseudolikelihood"), t, missing, S[:7])
    np.testing.assert_allclose(value, closed_form(X[:7], S[:7], t)[keep].sum(), rtol=1e-5)


def test_pseudolikelihood_warns_of_integrals_that_the_grid_does_not_hold():
    def flat(x, s):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda e: jnp.sum(e[2:]), (5,), support=SUPPORT), obs=np.c_[x, s])

    with pytest.warns(UserWarning, match="integrals over the continuous elements are not accurate"):
        surrogate(ebm.estimate(flat, "pseudolikelihood"), {}, X[:7], S[:7])


def minimiser(name, **options):
    """Parameters that maximise an objective whose draws are frozen."""
    start, unravel = ravel_pytree(ZERO)
    wrapped = ebm.estimate(model, name, **options)

    @jax.jit
    def loss(flat):
        seeded = handlers.seed(wrapped, KEY)
        return -numpyro.infer.util.log_density(seeded, (X, S), {}, unravel(flat))[0] / len(X)

    found = scipy.optimize.minimize(jax.value_and_grad(loss), start, jac=True, method="BFGS", options={"gtol": 1e-4})
    return unravel(jnp.asarray(found.x))


OBJECTIVES = {
    "pseudolikelihood": {"num_points": 33},
    "energy_discrepancy": {},
    "energy_discrepancy of hidden elements": {"noise": "absorbing", "noise_scale": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OBJECTIVES)
def test_objectives_recover_the_parameters(case):
    check_estimate(minimiser(case.split(" ")[0], **OBJECTIVES[case]))


CHAINS = {
    "cd": {"num_steps": 5},
    "pcd": {"num_steps": 5, "kernel": {"x": "mala", "s": "flips"}},
    "replay": {"num_steps": 5, "buffer_size": 2000},
    "mle": {"num_steps": 10, "kernel": {"x": ebm.HMC(0.5, 3), "s": "gibbs"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_chains_recover_the_parameters(name):
    check_estimate(fit(ebm.estimate(model, name, **CHAINS[name]), X, S, steps=600, rate=0.05))


@pytest.mark.slow
def test_the_step_size_follows_the_acceptance_of_its_own_kernel():
    """Flips are nearly always refused here, and MALA must not shrink its step for that."""
    likely = {"B": 0.1 * TRUE["B"], "b": jnp.full(3, 4.0), "J": TRUE["J"]}
    estimated = ebm.estimate(model, "cd", num_steps=2, kernel={"x": "mala", "s": "flips"})
    svi = SVI(handlers.substitute(estimated, likely), ebm.empty_guide, optax.sgd(0.0), Trace_ELBO())
    x, s = X[:200], np.ones((200, 3))
    state = jax.jit(
        lambda: jax.lax.scan(lambda state, _: svi.update(state, x, s), svi.init(KEY, x, s), None, length=100)[0]
    )()
    ((_, holder),) = state.mutable_state.items()
    health = holder["state"].health
    assert abs(float(health.mean_acceptance) - ebm.MALA.target_acceptance) < 0.1
    assert not np.any(health.conditions)


class TestDerivatives:
    """One number and one bit: E = a x^2 / 2 - b x s - c s, whose log Z is that of two normals."""

    SUPPORT = ebm.Blocks(("x", "s"), (constraints.real, constraints.boolean), ((), ()))
    AT = (1.3, 0.7, -0.4)
    CHAINS = {"num_steps": 15, "kernel": {"x": ebm.HMC(0.5, 4), "s": "gibbs"}, "adapt_step_size": False}
    MIXED_NAMES = {
        "pseudolikelihood": {"num_points": 33},
        "energy_discrepancy": {"num_negatives": 4},
        "cd": CHAINS,
        "pcd": CHAINS,
        "replay": {**CHAINS, "buffer_size": 2000, "start": "data"},
        "mle": CHAINS,
    }

    def model(self, rows):
        a, b, c = (numpyro.param(name, jnp.asarray(value)) for name, value in zip("abc", self.AT, strict=True))
        energy = lambda e: 0.5 * a * e[0] ** 2 - b * e[0] * e[1] - c * e[1]  # noqa: E731
        with numpyro.plate("rows", len(rows)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,), support=self.SUPPORT), obs=rows)

    def rows(self, num):
        """Rows of another law than that of the parameters."""
        rng = np.random.default_rng(0)
        s = rng.random(num) < 0.75
        return np.stack([0.7 * rng.normal(size=num) - 0.4 * s, s], axis=1)

    def exact_gradient(self, rows):
        def log_likelihood(t):
            a, b, c = t
            x, s = rows.T
            log_z = 0.5 * jnp.log(2 * jnp.pi / a) + jnp.logaddexp(0.0, c + b**2 / (2 * a))
            return jnp.mean(-0.5 * a * x**2 + b * x * s + c * s) - log_z

        return np.asarray(jax.grad(log_likelihood)(jnp.array(self.AT)))

    def value(self, name, rows):
        wrapped = ebm.estimate(self.model, name, **self.MIXED_NAMES[name])

        def value(t, key):
            given = dict(zip("abc", t, strict=True))
            return numpyro.infer.util.log_density(handlers.seed(wrapped, key), (rows,), {}, given)[0] / len(rows)

        return value

    def test_every_estimator_has_its_row(self):
        assert set(self.MIXED_NAMES) == TAKEN
        assert {name for name in TAKEN if ESTIMATORS.classes[name].role == "objective"} == {
            "pseudolikelihood",
            "energy_discrepancy",
        }

    @pytest.mark.parametrize("name", ["pseudolikelihood", "energy_discrepancy"])
    @pytest.mark.usefixtures("x64")
    def test_finite_differences_agree_with_the_gradient_of_an_objective(self, name):
        rows = self.rows(200)  # the integrals beyond 8 standard deviations of fewer rows would count, without a gradient
        value = jax.jit(self.value(name, rows))
        t, step = jnp.array(self.AT), 1e-5
        slopes = [(value(t + step * e, KEY) - value(t - step * e, KEY)) / (2 * step) for e in jnp.eye(3)]
        gradient = jax.jit(jax.grad(self.value(name, rows)))(t, KEY)
        assert np.all(np.abs(gradient) > 1e-3)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("name", ["cd", "pcd", "replay", "mle"])
    def test_the_mean_gradient_of_chains_is_that_of_the_likelihood(self, name):
        rows = self.rows(2000)
        gradient = jax.jit(jax.grad(self.value(name, rows)))
        found = np.stack([gradient(jnp.array(self.AT), key) for key in jax.random.split(KEY, 8)])
        error = found.std(0, ddof=1) / np.sqrt(len(found))
        exact = self.exact_gradient(rows)
        assert np.all(abs(exact) > 0.1)  # far from the optimum, where a wrong gradient would be far off as well
        assert np.all(error < 0.02)
        assert np.all(abs(found.mean(0) - exact) < 5 * error)


def test_log_z():
    d = distribution()
    exact = float(jax.nn.logsumexp(log_weights(TRUE)) + np.log(2 * np.pi))
    found = ebm.log_partition(KEY, d, method="importance", proposal=d.reference, num_samples=4000)
    assert abs(found.value - exact) < 5 * found.standard_error < 0.3


@pytest.mark.slow
def test_log_z_by_annealing():
    exact = float(jax.nn.logsumexp(log_weights(TRUE)) + np.log(2 * np.pi))
    found = ebm.log_partition(KEY, distribution(), method="ais", num_levels=200, num_chains=64)
    assert abs(found.value - exact) < 5 * found.standard_error < 0.2


def boolean_pair(s, k):
    """Two sites with the same values: their joint event is discrete as a whole."""
    t = numpyro.param("t", 0.0)
    with numpyro.plate("rows", len(s)):
        s = numpyro.sample("s", dist.Bernoulli(0.3), obs=s)
        k = numpyro.sample("k", dist.Bernoulli(0.5).expand([2]).to_event(1), obs=k)
        ebm.energy_factor("e", lambda s, k: -t * s * jnp.sum(k), s=s, k=k)


def test_members_with_the_same_values_are_one_discrete_event():
    s, k = np.array([0, 1, 1]), np.array([[0, 1], [1, 1], [0, 0]])
    value = surrogate(ebm.estimate(boolean_pair, "exact"), {"t": 0.7}, s, k)
    own = lambda s, k: dist.Bernoulli(0.3).log_prob(s) + 2 * np.log(0.5) + 0.7 * s * k.sum(-1)  # noqa: E731
    log_z = np.logaddexp.reduce([own(r[0], r[1:]) for r in STATES])
    np.testing.assert_allclose(value, np.sum(own(s, k)) - 3 * log_z, rtol=1e-5)


def spins_and_bits(s, k):
    with numpyro.plate("rows", len(s)):
        s = numpyro.sample("s", dist.ImproperUniform(ebm.spins, (), ()), obs=s)
        k = numpyro.sample("k", dist.Bernoulli(0.5), obs=k)
        ebm.energy_factor("e", lambda s, k: -0.7 * s * k, s=s, k=k)


def test_members_with_other_values_have_conditionals_of_their_own():
    s, k = np.array([-1, 1, 1]), np.array([0, 1, 0])
    value = surrogate(ebm.estimate(spins_and_bits, "pseudolikelihood"), {}, s, k)
    expected = jax.nn.log_sigmoid(2 * 0.7 * s * k) + jax.nn.log_sigmoid((2 * k - 1) * 0.7 * s)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)


TABLE = ebm.Blocks(
    ("a", "b", "c"), (constraints.boolean, constraints.integer_interval(-1, 1), ebm.one_hot), ((2,), (), (1, 4))
)


def test_members_with_lists_of_values_of_their_own_are_summed_over():
    energy = lambda v: 0.3 * v[0] * v[2] - 0.5 * v[1] + 0.2 * v[2] ** 2 + (0.5 + v[0]) * jnp.dot(v[3:], jnp.arange(4.0))  # noqa: E731
    states = [(a, b, c, *np.eye(4)[k]) for a in (0, 1) for b in (0, 1) for c in (-1, 0, 1) for k in range(4)]
    d = ebm.EnergyDistribution(energy, (7,), support=TABLE)
    expected = np.logaddexp.reduce([-float(energy(jnp.array(state))) for state in states])
    np.testing.assert_allclose(ebm.log_partition(None, d, method="enumerate").value, expected, rtol=1e-6)

    def row(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", d, obs=x)

    value = surrogate(ebm.estimate(row, "exact"), {}, np.array(states[5:7]))
    np.testing.assert_allclose(value, sum(-float(energy(jnp.array(s))) - expected for s in states[5:7]), rtol=1e-5)


def table(a, b):
    w = numpyro.param("w", jnp.zeros((3, 5)))
    with numpyro.plate("rows", len(a)):
        a = numpyro.sample("a", dist.Categorical(probs=jnp.ones(3) / 3), obs=a)
        b = numpyro.sample("b", dist.Categorical(probs=jnp.ones(5) / 5), obs=b)
        ebm.energy_factor("e", lambda a, b: -w[a, b], a=a, b=b)


def test_the_exact_likelihood_of_a_table_is_largest_at_its_shares():
    """The score of a saturated model is the difference of shares, so it is 0 at the logs of the shares of the rows."""
    a, b = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 3, 4, 1, 1, 2])
    shares = np.full((3, 5), 1e-6)
    np.add.at(shares, (a, b), 1.0)
    slope = jax.grad(lambda w: surrogate(ebm.estimate(table, "exact"), {"w": w}, a, b))
    np.testing.assert_allclose(slope(jnp.log(shares)), 0.0, atol=1e-3)
    np.testing.assert_allclose(slope(jnp.zeros((3, 5)))[0], [0.6, -0.4, -0.4, 0.6, -0.4], rtol=1e-4)


OPTIONS = {name: case[0] for name, case in {**CASES, **OTHERS}.items()}


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS.classes) - TAKEN))
def test_every_other_estimator_refuses_and_names_the_discrete_members(name):
    with pytest.raises(ebm.EnergyError, match=rf"members \['s'\].*'{name}'.*'cd', 'energy_discrepancy'"):
        surrogate(ebm.estimate(model, name, **OPTIONS[name]), ZERO, X[:5], S[:5])


def test_the_table_of_those_that_take_mixed_events():
    assert {name for name, cls in ESTIMATORS.classes.items() if cls.takes_mixed} == TAKEN


def estimated(name, **options):
    return lambda: surrogate(ebm.estimate(model, name, **options), ZERO, X[:5], S[:5])


def sampled(kernel):
    return lambda: ebm.sample(KEY, distribution(), kernel, num_warmup=1, num_samples=1)


TWO = ebm.Blocks(("x", "y", "s"), (constraints.real, constraints.real, constraints.boolean), ((), (), ()))


def two_steps():
    d = ebm.EnergyDistribution(lambda e: jnp.sum(e**2), (3,), support=TWO)

    def both(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", d, obs=x)

    kernel = {"x": "mala", "y": "barker", "s": "gibbs"}
    return surrogate(ebm.estimate(both, "cd", kernel=kernel), {}, np.c_[X[:5], S[:5, :1]])


def counts():
    support = ebm.Blocks(("x", "n"), (constraints.real, constraints.nonnegative_integer), ((), ()))
    return ebm.sample(
        KEY, ebm.EnergyDistribution(lambda e: jnp.sum(e**2), (2,), support=support), {"x": "nuts", "n": "gibbs"}
    )


REFUSED = {
    "one kernel in sample": (sampled("nuts"), r"discrete members \['s'\].*\{'x': 'nuts', 's': 'gibbs'\}"),
    "a discrete kernel in sample": (sampled("gibbs"), r"discrete members \['s'\]"),
    "one kernel in cd": (estimated("cd", kernel="mala"), r"\{'x': 'mala', 's': 'gibbs'\}"),
    "tempering": (sampled(ebm.ParallelTempering("mala")), "cannot move all its members"),
    "a member without a kernel": (sampled({"x": "nuts"}), r"members of the event are \['s', 'x'\]"),
    "a continuous kernel of bits": (sampled({"x": "nuts", "s": "nuts"}), "'nuts' cannot move 's', which is discrete"),
    "a discrete kernel of numbers": (sampled({"x": "gibbs", "s": "gibbs"}), "'gibbs' cannot move 'x', which is continuous"),
    "a gradient kernel of bits": (sampled({"x": "nuts", "s": "gwg"}), "'gwg' takes gradients in the discrete members"),
    "values without bounds": (counts, "values of 'n' cannot be listed.*lattice_walk"),
    "two step sizes": (two_steps, r"follows one step size.*\['mala', 'barker'\]"),
    "scales": (estimated("cd", scale=2.0), "discrete members of a mixed event have no scale"),
    "a schedule without a step size": (
        estimated(
            "cd", kernel={"x": ebm.EllipticalSlice(mean=0.0, covariance=1.0), "s": "gibbs"}, step_size_schedule=lambda i: 0.1
        ),
        "No kernel of a member has a step size",
    ),
    "no sum over numbers": (estimated("exact"), r"members \['s'\].*'exact' where all are discrete"),
    "no sum over counts": (
        lambda: ebm.log_partition(
            None,
            ebm.EnergyDistribution(
                lambda e: jnp.sum(e**2),
                (2,),
                support=ebm.Blocks(("b", "n"), (constraints.boolean, constraints.nonnegative_integer), ((), ())),
            ),
            method="enumerate",
        ),
        r"members \['b', 'n'\].*method='ais'",
    ),
    "points without an integral": (
        lambda: surrogate(ebm.estimate(spins_and_bits, "pseudolikelihood", num_points=65), {}, S[:5, 0] * 2 - 1, S[:5, 0]),
        "num_points=65 is for integrals",
    ),
    "blocks": (estimated("pseudolikelihood", block_size=2), "Blocks hold discrete elements"),
    "an even grid": (estimated("pseudolikelihood", num_points=32), "odd number of points"),
    "a noise scale per dimension": (estimated("energy_discrepancy", noise_scale=jnp.ones(2)), "one number"),
    "noise of other values": (estimated("energy_discrepancy", noise=np.eye(3) / 2 + 1 / 6), "3 rows.*2 values"),
    "a score": (
        lambda: ebm.ScoreDistribution(lambda e: -e, (5,), support=SUPPORT),
        "A score is a gradient",
    ),
    "sampling by a score": (lambda: distribution().unconstrained_score(jnp.zeros(5)), r"members \['s'\].*are discrete"),
    "the loss of score matching": (lambda: ebm.sm_loss(distribution(), np.c_[X[:5], S[:5]]), "derivatives in the event"),
    "a latent of a model": (
        lambda: ebm.sample(KEY, lambda: numpyro.sample("e", distribution()), num_warmup=1, num_samples=1),
        "At site 'e'.*sample the distribution itself",
    ),
    "log Z on a grid": (lambda: ebm.log_partition(None, distribution(), method="grid"), r"members \['s'\].*'grid'"),
    "log Z by a fitted proposal": (lambda: ebm.log_partition(KEY, distribution(), method="importance"), "proposal="),
    "log Z with a mass matrix": (
        lambda: ebm.log_partition(KEY, distribution(), method="ais", kernel={"x": "nuts", "s": "gibbs"}),
        "no mass matrix",
    ),
    "data between the values": (
        lambda: surrogate(ebm.estimate(model, "cd"), ZERO, X[:5], S[:5] + 0.5),
        "lies outside the support",
    ),
    "a repeated name": (lambda: ebm.Blocks(("x", "x"), (constraints.real,) * 2, ((), ())), "names that differ"),
    "a vector's constraint of a number": (lambda: ebm.Blocks(("p",), (constraints.simplex,), ((),)), "member 'p'"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_is_refused(how):
    call, words = REFUSED[how]
    with pytest.raises(ebm.EnergyError, match=words):
        call()
