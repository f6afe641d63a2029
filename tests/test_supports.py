"""Supports: what is known of their bounds, which others stand for the same set, and data that do not lie in them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from estimator_cases import continuous_options
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.known import freeze_tree, known

X = np.linspace(0.1, 0.9, 30)


def energy(x):
    return 0.5 * jnp.sum(x)


def model_of(support, event_shape=(), **kwargs):
    """A model of one tilted density; the support may be made inside it."""

    def model(x):
        t = numpyro.param("t", 0.5)
        given = support() if callable(support) and not isinstance(support, constraints.Constraint) else support
        with numpyro.plate("rows", len(x)):
            d = ebm.EnergyDistribution(lambda v: t * jnp.sum(v), event_shape, support=given, **kwargs)
            numpyro.sample("x", d, obs=x)

    return model


def svi_of(model, name, options):
    return SVI(ebm.estimate(model, name, **options), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())


def traced(model, name, x=X, **options):
    """A first update as it is traced: with its checks, and without the time to compile it."""
    svi = svi_of(model, name, options)
    return jax.eval_shape(lambda rng_key: svi.update(svi.init(rng_key, x), x)[1], jax.random.key(0))


def updated(model, name, x=X, num=1, **options):
    """What SVI returns after some updates."""
    return svi_of(model, name, options).run(jax.random.key(0), num, x, progress_bar=False)


class TestKnown:
    def test_constants_are_known_under_jit_and_arguments_are_not(self):
        @jax.jit
        def check(x):
            made = (jnp.zeros(()), -jnp.asarray(2.0), jnp.linspace(0, 1, 3), jnp.stack([jnp.zeros(()), jnp.ones(())]), 0.5)
            for value, expected in zip(made, (0, -2, [0, 0.5, 1], [0, 1], 0.5), strict=True):
                np.testing.assert_allclose(known(value), expected)
            assert known(x) is known(2 * x + 1) is known(jnp.zeros(()) + x) is None
            jax.grad(lambda y: (np.testing.assert_array_equal(known(jnp.ones(2)), 1), y)[1])(x)
            jax.grad(lambda y: y if known(y) is None else 1 / 0)(x)
            return x

        check(1.0)
        jax.vmap(lambda x: x if known(x) is None else 1 / 0)(jnp.ones(2))

    def test_a_frozen_support_compares_by_value(self):
        one, two = (freeze_tree(constraints.interval(jnp.zeros(2), jnp.array([1.0, b]))) for b in (2.0, 2.0))
        assert one == two
        assert one != freeze_tree(constraints.interval(jnp.zeros(2), jnp.array([1.0, 3.0])))
        np.testing.assert_array_equal(one.thaw().upper_bound, [1, 2])


def bound_of_a_parameter():
    return constraints.interval(0.0, numpyro.param("h", 4.0, constraint=constraints.greater_than(2.0)))


def bound_of_a_latent():
    return constraints.interval(0.0, numpyro.sample("h", dist.Uniform(1.0, 2.0)))


def latent_event():
    h = numpyro.sample("h", dist.Uniform(1.0, 2.0))
    numpyro.sample("x", ebm.EnergyDistribution(energy, support=constraints.interval(0.0, h)))


def unobserved():
    numpyro.sample("x", ebm.EnergyDistribution(energy, support=bound_of_a_parameter()))


def factor_model(x):
    h = numpyro.param("h", 4.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.Uniform(0.0, h), obs=x)
        ebm.energy_factor("phi", lambda x: numpyro.param("t", 1.0) * x, x=x)


DOORS = {
    **{
        name: lambda name=name, options=options: traced(model_of(bound_of_a_parameter), name, **options)
        for name, options in continuous_options().items()
        if name in ("sm", "dsm", "conditional_nce", "energy_discrepancy", "pcd", "generalized_sm", "nce", "cd")
    },
    "factor": lambda: traced(factor_model, "sm"),
    "NUTS of an objective": lambda: MCMC(
        NUTS(ebm.estimate(model_of(bound_of_a_latent), ebm.ScoreMatching(trace="columns"))), num_warmup=1, num_samples=1
    ).run(jax.random.key(0), X),
    "MCMC of the event": lambda: MCMC(ebm.BlackJAXKernel(latent_event, "nuts"), num_warmup=1, num_samples=1).run(
        jax.random.key(0)
    ),
    "jit": lambda: jax.jit(lambda h: ebm.EnergyDistribution(energy, support=constraints.less_than(h)).log_prob(0.5))(1.0),
    "a bound of the base": lambda: jax.jit(
        lambda h: ebm.EnergyDistribution(energy, base=dist.Uniform(0.0, h), support=constraints.unit_interval).log_prob(0.5)
    )(1.0),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_bound_that_is_not_known_is_refused(door):
    with pytest.raises(ebm.EnergyError, match="bound of the .* not known when the model is traced"):
        DOORS[door]()


@pytest.mark.slow
def test_the_bound_of_a_fixed_parameter_is_a_number():
    for h in (0.5, 3.0):
        draws = ebm.sample(jax.random.key(0), unobserved, "mala", params={"h": h}, num_warmup=50, num_samples=50)
        assert 0.8 * h < draws.samples["x"].max() <= h


MADE_INSIDE = {
    "arrays": lambda: constraints.interval(jnp.asarray(0.0), jnp.ones(())),
    "computed": lambda: constraints.interval(jnp.zeros(()), 0.5 * jnp.asarray(2.0)),
    "numbers": lambda: constraints.interval(0.0, 1.0),
}


def test_bounds_made_of_constants_inside_the_model_work():
    results = [updated(model_of(MADE_INSIDE[name]), "sm", num=2).params["t"] for name in ("computed", "numbers")]
    np.testing.assert_array_equal(*results)
    for name in ("nce", "generalized_sm", "pcd"):
        traced(model_of(MADE_INSIDE["arrays"]), name)


# Supports with an event shape, and rows inside.
SUPPORTS = {
    "unit_interval": (constraints.unit_interval, (), X),
    "interval": (constraints.interval(-1.0, 1.0), (), X),
    "open_interval": (constraints.open_interval(0.0, 1.0), (), X),
    "greater_than": (constraints.greater_than(0.05), (), X),
    "less_than": (constraints.less_than(1.0), (), X),
    "positive": (constraints.positive, (), X),
    "softplus_positive": (constraints.softplus_positive, (), X),
    "circular": (constraints.circular, (), X),
    "bounds of each coordinate": (constraints.interval(np.zeros(2), np.array([1.0, 2.0])), (2,), np.stack([X, X**2], 1)),
    "simplex": (constraints.simplex, (2,), np.stack([X, 1 - X], 1)),
    "ordered_vector": (constraints.ordered_vector, (2,), np.stack([X, X + 1], 1)),
    "l1_ball": (constraints.l1_ball, (2,), np.stack([X / 3, X / 2], 1)),
    "boolean": (constraints.boolean, (), (X > 0.4).astype(int)),
    "integer_interval": (constraints.integer_interval(1, 5), (), np.arange(30) % 5 + 1),
}


@pytest.mark.parametrize("support", SUPPORTS)
def test_default_noise_fits_every_support(support):
    given, shape, x = SUPPORTS[support]
    for name in ("nce", "ranking_nce") if support in ("interval", "circular") else ("nce",):
        try:
            traced(model_of(given, shape), name, x)
        except ebm.EnergyError as error:
            assert "works on continuous events" in str(error)  # noqa: PT017
            assert given.is_discrete


NARROWER = {
    "a row's own bound": lambda: dist.TruncatedNormal(jnp.zeros(3), 1.0, low=jnp.array([0.0, 0.5, 0.0])),
    "the upper end of one row": lambda: dist.Uniform(jnp.zeros(3), jnp.array([1.0, 1.0, 0.9])),
    "a discrete range": lambda: dist.DiscreteUniform(0, 3),
    "counts of one row": lambda: dist.Binomial(jnp.array([9, 9, 4]), 0.5),
    "categories": lambda: dist.Categorical(jnp.ones(4) / 4),
}
OURS = {
    "a row's own bound": constraints.nonnegative,
    "the upper end of one row": constraints.unit_interval,
}


@pytest.mark.parametrize("case", NARROWER)
def test_a_narrower_base_is_refused(case):
    with pytest.raises(ebm.EnergyError, match="base .* has support .*, the energy has"):
        ebm.EnergyDistribution(energy, base=NARROWER[case](), support=OURS.get(case, constraints.integer_interval(0, 9)))


def test_the_same_set_by_another_name_is_taken():
    for base, support in (
        (dist.DiscreteUniform(0, 1), constraints.boolean),
        (dist.Binomial(4, 0.5), constraints.integer_interval(0, 4)),
        (dist.Beta(jnp.ones(3), 2.0), constraints.interval(0.0, 1.0)),
        (dist.Uniform(jnp.zeros(3), jnp.ones(3)), constraints.unit_interval),
        (dist.VonMises(0.0, 1.0), constraints.interval(-jnp.pi, jnp.pi)),
    ):
        ebm.EnergyDistribution(energy, base=base, support=support)


@pytest.mark.parametrize("role", ["noise", "start"])
def test_noise_and_starts_on_another_set_are_refused(role):
    narrow = dist.TruncatedNormal(0.0, 1.0, low=0.05)
    name = "nce" if role == "noise" else "mle"
    with pytest.raises(ebm.EnergyError, match=f"The {role} .* has support"):
        traced(model_of(constraints.positive), name, **{role: narrow})


@pytest.mark.parametrize(
    ("support", "shape", "message"),
    [
        (constraints.sphere, (3,), "Sphere has no transform.*angles.*circular"),
        (constraints.multinomial(4), (3,), "Multinomial are not integers between bounds of their own"),
    ],
)
def test_supports_without_a_transform_or_an_end_say_what_to_write(support, shape, message):
    with pytest.raises(ebm.EnergyError, match=message):
        ebm.sample(jax.random.key(0), ebm.EnergyDistribution(energy, shape, support=support), num_warmup=1, num_samples=1)


class TestLattice:
    spins = np.random.default_rng(0).choice([-1.0, 1.0], (40, 3))

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (spins, r"all values are -1 and 1 only.*constraints.boolean.*s = 2 \* x - 1"),
            ((spins + 1).astype(int) // 2, r"all values are 0 and 1 only.*constraints.boolean"),
            (np.concatenate([spins, np.random.default_rng(1).normal(size=(40, 1))], 1), r"3 of 4 coordinates.*from -1 to 1"),
            (np.arange(120).reshape(40, 3) % 5, r"whole numbers from 0 to 4, which repeat.*uniform"),
        ],
    )
    def test_whole_numbers_that_repeat_are_named(self, x, message):
        with pytest.warns(UserWarning, match=message):
            traced(model_of(constraints.real, x.shape[1:]), "sm", x)

    @pytest.mark.parametrize("x", [spins[:10], np.arange(40.0), np.zeros((40, 2)), 0.5 * spins])
    def test_others_are_not(self, x):
        traced(model_of(constraints.real, x.shape[1:]), "ssm", x)


ROWS_ON_AN_END = np.concatenate([np.zeros(20), X])


@pytest.mark.parametrize("name", ["sm", "nce", "cd", "ranking_nce"])
def test_rows_on_an_end_are_named_with_the_ways_out(name):
    with pytest.raises(ebm.EnergyError, match=r"Row 0 .* boundary.*20 such rows.*generalized_sm.*Bernoulli"):
        traced(model_of(constraints.nonnegative), name, ROWS_ON_AN_END)


def test_generalized_sm_takes_rows_on_an_end():
    # Under the weight "distance" the loss of a row is t^2 x / 2 - t: an end counts by -t.
    result = updated(model_of(constraints.nonnegative), "generalized_sm", ROWS_ON_AN_END, num=1, weighting="distance")
    t = 0.5
    expected = np.sum(0.5 * t**2 * ROWS_ON_AN_END - t)
    np.testing.assert_allclose(result.losses[0], expected, rtol=1e-4)


def test_a_value_of_none_is_no_value():
    def prior():
        t = numpyro.param("t", 1.0)
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2))

    none = {"t": None}
    rng_key = jax.random.key(0)
    calls = (
        lambda: ebm.sample(rng_key, prior, "nuts", params=none),
        lambda: MCMC(ebm.BlackJAXKernel(prior, "nuts", params=none), num_warmup=1, num_samples=1).run(rng_key),
        lambda: ebm.log_partition(rng_key, prior, method="grid", params=none),
        lambda: ebm.log_likelihood(model_of(constraints.real), none, X, log_partition=0.0),
        lambda: ebm.training_report(ebm.estimate(model_of(constraints.real), "sm"), none, X),
    )
    for call in calls:
        with pytest.raises(ebm.EnergyError, match=r"parameters \['t'\].*(without values|no value)"):
            call()
