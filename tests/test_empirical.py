"""Rows as base and noise: ratios of densities."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import fit, some_slow, surrogate

import numpyro_ebm as ebm

RNG = np.random.default_rng(0)
OTHERS = RNG.normal(0, 1, (3000, 2)).astype(np.float32)
ROWS = RNG.normal([0.5, 0.0], 1, (3000, 2)).astype(np.float32)
NORMAL = dist.Normal(0, 1).expand([2]).to_event(1)


def tilt(x, base=None):
    """exp(w . x) over the base: where this is N(0, I), the mean is w and log Z is |w|^2 / 2."""
    w = numpyro.param("w", jnp.zeros(2))
    base = ebm.Empirical(OTHERS) if base is None else base
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: -x @ w, (2,), base=base), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(["nce"], ["ranking_nce", "bregman_nce"]))
def test_the_ratio_to_rows(name):
    params = fit(ebm.estimate(tilt, name, nu=5), ROWS, steps=600)
    # Both samples have a mean of standard error 1 / sqrt(3000) per dimension.
    np.testing.assert_allclose(params["w"], ROWS.mean(axis=0) - OTHERS.mean(axis=0), atol=0.03)
    if name != "ranking_nce":
        np.testing.assert_allclose(params["x$log_normalizer"], 0.125, atol=0.02)


@pytest.mark.slow
def test_the_report_says_that_their_sampling_is_in_no_error():
    params = {"w": jnp.array([0.5, 0.0]), "x$log_normalizer": 0.125}
    report = ebm.training_report(ebm.estimate(tilt, "nce", nu=5), params, ROWS)
    assert "the 3000 Empirical rows count as a known distribution" in str(report)
    assert 0 < report.sites[0].figures["log_normalizer_se"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nce", "ranking_nce", "bregman_nce"])
def test_a_density_that_cancels_need_not_be_known(name):
    def known(x):
        return tilt(x, NORMAL)

    params = {"w": jnp.array([0.3, -0.2]), "x$log_normalizer": 0.1}
    relative = surrogate(ebm.estimate(tilt, name, nu=3), params, ROWS[:20])
    # Over another base: its density is in the energy's place as in the noise's.
    other = surrogate(ebm.estimate(known, name, nu=3, noise=OfKnownDensity(OTHERS)), params, ROWS[:20])
    np.testing.assert_allclose(relative, other, rtol=1e-4)


class OfKnownDensity(dist.Distribution):
    """Rows drawn as Empirical draws them, said to be standard normal."""

    support = dist.constraints.real_vector
    arg_constraints = {}
    pytree_data_fields = ("rows",)

    def __init__(self, rows):
        self.rows = rows
        super().__init__((), rows.shape[1:])

    def sample(self, key, sample_shape=()):
        return ebm.Empirical(self.rows).sample(key, sample_shape)

    def log_prob(self, value):
        return NORMAL.log_prob(value)


@pytest.mark.slow
def test_log_z_starts_half_way_between_the_medians_of_both():
    takes_part = np.arange(10) % 5 > 0

    def model(x):
        base = ebm.Empirical([4.0])
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=takes_part):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: -x, base=base), obs=x)

    x = np.random.default_rng(0).normal(size=10).astype(np.float32)
    seeded = numpyro.handlers.seed(ebm.estimate(model, "nce"), 0)
    with jax.debug_nans(True):
        start = numpyro.handlers.trace(seeded).get_trace(x)["x$log_normalizer"]["value"]
    np.testing.assert_allclose(start, (np.median(x[takes_part]) + 4.0) / 2, rtol=1e-5)


def test_draws_are_rows_of_the_support():
    rows = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    law = ebm.Empirical(rows, dist.constraints.simplex)
    draws = np.asarray(law.expand((2,)).sample(jax.random.key(0), (3000,)))
    assert draws.shape == (3000, 2, 2)
    assert law.support is dist.constraints.simplex
    counts = [(np.abs(draws - row).max(axis=-1) < 1e-6).mean() for row in rows]
    np.testing.assert_allclose(counts, 1 / 3, atol=5 * np.sqrt(2 / 9 / 6000))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda law: law)(law).rows, law.rows)


class TestRefusals:
    @pytest.mark.parametrize("name", ["sm", "cd", "conditional_nce"])
    def test_the_density_is_not_known(self, name):
        with pytest.raises(ValueError, match="site 'x'.*density of Empirical rows is not known"):
            surrogate(ebm.estimate(tilt, name), {"w": jnp.zeros(2)}, ROWS[:10])

    def test_noise_of_another_base(self):
        def over_normal(x):
            return tilt(x, NORMAL)

        model = ebm.estimate(over_normal, "nce", noise=ebm.Empirical(OTHERS))
        with pytest.raises(ValueError, match=r"site 'x'.*base=Empirical\(rows\)"):
            surrogate(model, {"w": jnp.zeros(2)}, ROWS[:10])
        with pytest.raises(ValueError, match="site 'x'.*density of Empirical rows"):
            surrogate(ebm.estimate(tilt, "nce", noise=NORMAL), {"w": jnp.zeros(2)}, ROWS[:10])

    @pytest.mark.parametrize("rows", [np.zeros((0, 2)), 3.0])
    def test_no_rows(self, rows):
        with pytest.raises(ValueError, match="needs rows"):
            ebm.Empirical(rows)

    def test_no_key(self):
        with pytest.raises(ValueError, match="needs a random key"):
            ebm.Empirical(OTHERS).sample(None)

    @pytest.mark.parametrize(
        ("row", "support"),
        [
            ([np.nan, 0.0], dist.constraints.real),
            ([-1.0, 1.0], dist.constraints.positive),
            ([0.0, 1.0], dist.constraints.unit_interval),
        ],
    )
    def test_rows_that_could_be_no_noise(self, row, support):
        with pytest.raises(ValueError, match=r"Row 1 of Empirical is .*\(1 such rows\).*off its boundary"):
            ebm.Empirical(np.array([[0.5, 0.5], row]), support)

    def test_a_mixture_with_rows_has_no_density(self):
        proposal = lambda: numpyro.sample("x", NORMAL)  # noqa: E731
        model = ebm.estimate(tilt, "adversarial_nce", proposal=proposal)
        with pytest.raises(ValueError, match="site 'x'.*density of Empirical rows is not known"):
            surrogate(model, {"w": jnp.zeros(2)}, ROWS[:10])
