"""The grid surrogate of log Z: against exact values, under NUTS, with estimated nodes, its error, and what is refused."""

import itertools
import math
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import check_against_grid, some_slow
from numpyro.infer import MCMC, NUTS, Predictive

import numpyro_ebm as ebm
from numpyro_ebm.bayes import _hermite, log_partition_grid
from numpyro_ebm.energies import Graph, Ising

LATTICE = Graph.lattice(3, 3)
STATES = np.array(list(itertools.product((-1, 1), repeat=9))).reshape(-1, 3, 3)
SPINS = (  # one exact draw of a 10 x 10 lattice at J = 0.2, h = 0.1
    "+++-+--+++ -+-+++++++ ----+--+++ +---+----+ -+++++++-+ +---+-+--- ++-+--++-- ++++-++++- ++++-+-++- +++-+++-++"
)
GRID = {"J": (-0.2, 0.6, 13), "h": (-0.6, 0.6, 13)}


def ising(J, h=0.0):  # noqa: N803
    return Ising(LATTICE, J, h)


def gaussian(t):
    return ebm.EnergyDistribution(lambda x: 0.5 * t * x**2)


def gaussian_log_z(t):
    return 0.5 * jnp.log(2 * math.pi / t)


@pytest.fixture(scope="module")
def surrogate():
    return log_partition_grid(None, ising, GRID)


def axes_of(num, dimensions):
    return tuple(_hermite.Axis(-1.0, 2.0 / (num - 1), num) for _ in range(dimensions))


def nodes_of(axes):
    return jnp.stack(jnp.meshgrid(*(axis.nodes for axis in axes), indexing="ij"), axis=-1)


POLYNOMIALS = {
    1: lambda p: 1 + p[0] - 2 * p[0] ** 2 + 3 * p[0] ** 3,
    2: lambda p: p[0] ** 3 - p[1] ** 3 + p[0] ** 2 * p[1] - p[0] * p[1] ** 2 + 2 * p[0] * p[1],
    3: lambda p: p[0] ** 3 + p[1] ** 2 * p[2] - p[2] ** 3 + p[0] * p[1] * p[2] + p[0] ** 2 * p[2],
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_cubics_are_exact_for_polynomials_of_degree_three(x64, dimensions):
    axes, of = axes_of(5, dimensions), POLYNOMIALS[dimensions]
    nodes = nodes_of(axes).reshape(-1, dimensions)
    shape = (5,) * dimensions
    slopes = jnp.moveaxis(jax.vmap(jax.grad(of))(nodes), -1, 0).reshape(dimensions, *shape)
    table = _hermite.derivatives(axes, jax.vmap(of)(nodes).reshape(shape), slopes)
    points = np.random.default_rng(0).uniform(-1, 1, (50, dimensions))
    found, gradients = jax.vmap(jax.value_and_grad(lambda p: _hermite.interpolate(axes, table, p)))(points)
    np.testing.assert_allclose(found, jax.vmap(of)(points), atol=1e-12)
    np.testing.assert_allclose(gradients, jax.vmap(jax.grad(of))(points), atol=1e-11)


@pytest.mark.parametrize("num", some_slow([5, 13], [9, 33]))
def test_the_error_of_the_interpolation_is_bounded(x64, num):
    """In the middle of a grid that is coarse, and of one that is fine: sharp bends and smooth functions."""
    axes = axes_of(num, 2)
    of = lambda p: jnp.logaddexp(4 * p[0] + p[1], -4 * p[0] - p[1]) + 0.1 * jnp.cos(3 * p[1])  # noqa: E731
    nodes = nodes_of(axes).reshape(-1, 2)
    values = jax.vmap(of)(nodes).reshape(num, num)
    slopes = jnp.moveaxis(jax.vmap(jax.grad(of))(nodes), -1, 0).reshape(2, num, num)
    table = _hermite.derivatives(axes, values, slopes)
    errors = jax.jit(_hermite.leave_out_errors, static_argnums=0)(axes, values, slopes)
    points = np.random.default_rng(0).uniform(-1, 1, (2000, 2))
    found = jax.jit(jax.vmap(lambda p: _hermite.interpolate(axes, table, p)))(points)
    bounds = jax.jit(jax.vmap(lambda p: _hermite.largest_of_cell(axes, errors, p)))(points) / 4
    actual = np.abs(found - jax.vmap(of)(points))
    assert np.max(actual) < np.max(bounds) < 50 * np.max(actual)
    assert np.mean(actual <= bounds) > 0.99


def test_log_z_of_the_ising_model_within_its_error(surrogate):
    rng = np.random.default_rng(1)
    at = {"J": rng.uniform(-0.2, 0.6, 300), "h": rng.uniform(-0.6, 0.6, 300)}
    exact = jax.vmap(lambda J, h: ising(J, h).log_partition())(at["J"], at["h"])  # noqa: N803
    errors = np.abs(surrogate(**at) - exact)
    assert np.all(errors <= surrogate.error(**at))
    assert np.max(errors) < 1e-3
    assert "13 nodes" in repr(surrogate)
    assert "J" in repr(surrogate)


def test_the_distribution_is_normalised_and_differentiable(surrogate):
    d = surrogate.distribution(J=0.37, h=-0.21)
    np.testing.assert_allclose(jnp.sum(jnp.exp(d.log_prob(STATES))), 1.0, rtol=1e-3)
    slope = jax.grad(lambda J: surrogate.distribution(J=J, h=0.1).log_prob(STATES[7]))(0.3)  # noqa: N803
    exact = jax.grad(lambda J: -ising(J, 0.1)(STATES[7]) - ising(J, 0.1).log_partition())(0.3)  # noqa: N803
    np.testing.assert_allclose(slope, exact, atol=5e-3)


def test_each_row_of_a_plate_may_have_its_own_parameters(surrogate):
    x, rows = jnp.linspace(-1, 1, 4), STATES[[3, 99, 200, 511]]

    def model():
        with numpyro.plate("rows", 4):
            numpyro.sample("s", surrogate.distribution(J=0.2, h=0.5 * x), obs=rows)

    log_prob, _ = numpyro.infer.util.log_density(model, (), {}, {})
    exact = sum(-ising(0.2, 0.5 * a)(s) - ising(0.2, 0.5 * a).log_partition() for a, s in zip(x, rows, strict=True))
    np.testing.assert_allclose(log_prob, exact, atol=2e-3)


def test_log_z_is_infinite_beyond_the_grid_and_the_gradient_finite(surrogate):
    value, slope = jax.jit(jax.value_and_grad(lambda J: surrogate(J=J, h=0.0)))(0.7)  # noqa: N803
    assert value == jnp.inf
    assert slope == 0
    assert jnp.isfinite(jax.jit(lambda J: surrogate(J=J, h=0.0))(0.6))  # noqa: N803


def test_the_posterior_of_a_coupling_under_nuts():
    """Case 6: the sum of s_i s_j over 20 lattices is 74; the prior reaches beyond the grid."""
    log_z = log_partition_grid(None, ising, {"J": (-0.6, 1.2, 13)})
    sums = -jax.vmap(ising(1.0))(jnp.asarray(STATES))
    rows = STATES[
        np.concatenate([np.flatnonzero(sums == 4)[:18], np.flatnonzero(sums == 0)[:1], np.flatnonzero(sums == 2)[:1]])
    ]

    def model(s):
        J = numpyro.sample("J", dist.Normal(0, 1))  # noqa: N806
        with numpyro.plate("rows", len(s)):
            numpyro.sample("s", log_z.distribution(J=J), obs=s)

    assert -jnp.sum(jax.vmap(ising(1.0))(jnp.asarray(rows))) == 74
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=3000, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.asarray(rows))
    draws = np.asarray(mcmc.get_samples()["J"])
    grid = np.linspace(-0.6, 1.2, 3001)
    exact = 74 * grid - 20 * jax.vmap(lambda J: ising(J).log_partition())(grid) - 0.5 * grid**2  # noqa: N803
    check_against_grid(draws, grid, np.asarray(exact))
    assert abs(draws.mean() - 0.2838) < 0.006
    assert abs(draws.std() - 0.0586) < 0.004


@pytest.mark.slow
def test_the_posterior_of_a_ten_by_ten_lattice_under_nuts():
    s = jnp.asarray([[1.0 if each == "+" else -1.0 for each in row] for row in SPINS.split()])
    log_z = log_partition_grid(
        None,
        lambda J, h: Ising(Graph.lattice(10, 10), J, h),
        {"J": (-0.2, 1.0, 25), "h": (-0.6, 0.6, 25)},  # noqa: N803
    )

    def model(s):
        J = numpyro.sample("J", dist.Uniform(-0.2, 1.0))  # noqa: N806
        h = numpyro.sample("h", dist.Uniform(-0.6, 0.6))
        numpyro.sample("s", log_z.distribution(J=J, h=h), obs=s)

    mcmc = MCMC(NUTS(model), num_warmup=1000, num_samples=40_000, progress_bar=False)
    mcmc.run(jax.random.key(0), s)
    draws = {name: np.asarray(each) for name, each in mcmc.get_samples().items()}
    for name, mean, sd in (("J", 0.0772, 0.0746), ("h", 0.1730, 0.1038)):
        ess = numpyro.diagnostics.effective_sample_size(draws[name][None])
        assert ess > 4000
        assert abs(draws[name].mean() - mean) < 5 * sd / np.sqrt(ess)
        np.testing.assert_allclose(draws[name].std(), sd, rtol=5 / np.sqrt(2 * ess))
    assert abs(np.corrcoef(draws["J"], draws["h"])[0, 1] + 0.491) < 0.03
    assert np.mean(log_z.error(**draws)) < 0.02


CHAINS = {
    "ais": ("ais", {"num_levels": 60, "num_chains": 300}, ising, {"J": (0.0, 0.4, 5)}),
    "smc": ("smc", {"num_particles": 500, "num_steps": 3}, gaussian, {"t": (1.0, 2.0, 5)}),
    "importance": ("importance", {"proposal": dist.Normal(0, 1.2), "num_samples": 4000}, gaussian, {"t": (1.0, 2.0, 5)}),
}


@pytest.mark.filterwarnings("ignore:The grid of log Z has a median error")
@pytest.mark.parametrize("case", some_slow(["ais", "importance"], ["smc"]))
def test_estimated_nodes_within_their_standard_errors(case):
    method, options, energy_of, grid = CHAINS[case]
    (name,) = grid
    log_z = log_partition_grid(jax.random.key(2), energy_of, grid, method=method, **options)
    exact = gaussian_log_z if energy_of is gaussian else lambda J: ising(J).log_partition()  # noqa: N803
    values, slopes = jax.vmap(jax.value_and_grad(exact))(log_z.axes[0][1].nodes)
    assert np.all(np.abs(log_z.values - values) < 5 * log_z.standard_error)
    assert np.all(np.abs(log_z.table[1] - slopes) < 5 * log_z.slope_error[name])
    assert np.max(log_z.slope_error[name]) < 0.5
    middle = 0.5 * (grid[name][0] + grid[name][1]) + 0.01
    assert abs(log_z(**{name: middle}) - exact(middle)) < log_z.error(**{name: middle})


def test_continuous_energies_by_the_trapezoidal_rule():
    log_z = log_partition_grid(None, gaussian, {"t": (0.5, 4.0, 15)}, method="grid")
    t = jnp.linspace(0.5, 4.0, 100)
    errors = np.abs(log_z(t=t) - gaussian_log_z(t))
    assert np.all(errors <= log_z.error(t=t))
    assert np.max(errors) < 2e-3


def top_level(J):  # noqa: N803
    return Ising(LATTICE, J)


def test_a_surrogate_pickles_and_passes_through_jit():
    log_z = log_partition_grid(None, top_level, {"J": (0.0, 0.4, 5)})
    again = pickle.loads(pickle.dumps(log_z))
    assert again(J=0.13) == log_z(J=0.13)
    assert jax.jit(lambda log_z: log_z(J=0.13))(log_z) == log_z(J=0.13)
    local = log_partition_grid(None, lambda J: Ising(LATTICE, J), {"J": (0.0, 0.4, 5)})  # noqa: N803
    with pytest.raises(TypeError, match="cloudpickle"):
        pickle.dumps(local)
    assert cloudpickle.loads(cloudpickle.dumps(local))(J=0.1) == local(J=0.1)


def test_predictive_draws_of_the_surrogates_distribution(surrogate):
    def model():
        numpyro.sample("s", surrogate.distribution(J=0.3, h=0.1))

    draws = Predictive(model, num_samples=400)(jax.random.key(3))["s"]
    sums = -np.asarray(jax.vmap(ising(1.0))(draws))
    p = np.asarray(jax.nn.softmax(-jax.vmap(ising(0.3, 0.1))(jnp.asarray(STATES))))
    all_sums = -np.asarray(jax.vmap(ising(1.0))(jnp.asarray(STATES)))
    sd = np.sqrt(p @ all_sums**2 - (p @ all_sums) ** 2)
    assert abs(sums.mean() - p @ all_sums) < 5 * sd / np.sqrt(400)


def test_an_error_that_many_rows_multiply_is_told(surrogate):
    def model():
        with numpyro.plate("rows", 10_000_000, subsample_size=3):
            numpyro.sample("s", surrogate.distribution(J=0.3, h=0.1), obs=STATES[:3])

    with pytest.warns(ebm.UnreliableLogPartitionWarning, match="10000000 rows.*finer grid"):
        numpyro.handlers.seed(model, 0)()


def per_row(t):
    return ebm.EnergyDistribution(lambda x, c: 0.5 * t * c * x**2, context=jnp.ones(3), batch_shape=(3,))


GRID_FORM = "lowest node.*odd and at least 5"
REFUSED = {
    "no key": (lambda: log_partition_grid(None, gaussian, {"t": (1.0, 2.0, 5)}), "is random.*jax.random.key"),
    "even": (lambda: log_partition_grid(None, ising, {"J": (0.0, 1.0, 6)}), GRID_FORM),
    "few": (lambda: log_partition_grid(None, ising, {"J": (0.0, 1.0, 3)}), GRID_FORM),
    "order": (lambda: log_partition_grid(None, ising, {"J": (1.0, 0.0, 5)}), GRID_FORM),
    "infinite": (lambda: log_partition_grid(None, ising, {"J": (0.0, math.inf, 5)}), GRID_FORM),
    "no grid": (lambda: log_partition_grid(None, ising, {}), GRID_FORM),
    "four parameters": (lambda: log_partition_grid(None, ising, dict.fromkeys("abcd", (0, 1, 5))), "one to three"),
    "no draws": (
        lambda: log_partition_grid(jax.random.key(0), gaussian, {"t": (1.0, 2.0, 5)}, method="nested"),
        "'nested' does not end with any.*method='ais'",
    ),
    "rows": (lambda: log_partition_grid(None, per_row, {"t": (1.0, 2.0, 5)}, method="grid"), r"rows of shape \(3,\)"),
    "not finite": (
        lambda: log_partition_grid(None, lambda J: Ising(LATTICE, J, jnp.sqrt(1 - J)), {"J": (0.0, 2.0, 5)}),  # noqa: N803
        "log Z at J = 1.5 = nan",
    ),
    "steep": (
        lambda: log_partition_grid(None, lambda J: Ising(LATTICE, jnp.sqrt(J)), {"J": (0.0, 2.0, 5)}),  # noqa: N803
        "derivative of log Z in J at J = 0 is",
    ),
    "data": (
        lambda: log_partition_grid(jax.random.key(0), gaussian, {"t": (1.0, 2.0, 5)}, method="bridge", draws=jnp.ones(9)),
        "Leave out data= and draws=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_grids(case):
    call, message = REFUSED[case]
    with pytest.raises(ebm.EnergyError, match=message):
        call()


def test_refused_parameters(surrogate):
    with pytest.raises(ebm.EnergyError, match=r"J = 0.8 lies outside.*Make the grid wider.*prior inside"):
        surrogate(J=0.8, h=0.0)
    with pytest.raises(ebm.EnergyError, match="no parameter 'j'.*Did you mean|no parameter 'j'.*Known names: J, h"):
        surrogate(j=0.1, h=0.0)
    with pytest.raises(ebm.EnergyError, match=r"\['h'\] have no value"):
        surrogate.distribution(J=0.1)
    with pytest.raises(TypeError, match="returned ArrayImpl"):
        log_partition_grid(None, lambda J: jnp.zeros(3), {"J": (0.0, 1.0, 5)})  # noqa: N803
