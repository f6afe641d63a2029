"""Pictures: what is drawn, in numbers; that grey keeps it apart; and that nothing of the user's is changed."""

import ast
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import arviz
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from helpers import precision_model
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.path import Path as Outline
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import norm

import numpyro_ebm as ebm
from numpyro_ebm import plots
from numpyro_ebm.estimators.parts.health import unknown

GAUSSIAN = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,))
IS_OLD = arviz.__version__.startswith("0.")


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


def luminance(color):
    return np.dot(to_rgb(color), [0.2126, 0.7152, 0.0722])


def check_grey(ax):
    """Every two labelled series differ in dashes, markers or kind, or in luminance."""
    lines = [("line", a.get_linestyle(), a.get_marker(), a.get_color()) for a in ax.lines if a.get_label()[0] != "_"]
    dashes = [a._unscaled_dash_pattern for a in ax.lines if a.get_label()[0] != "_"]
    looks = [
        (kind, style, str(dash), marker, color) for (kind, style, marker, color), dash in zip(lines, dashes, strict=True)
    ]
    outlines = [patch for patch in ax.patches if isinstance(patch, plt.Polygon)]
    looks += [("outline", p.get_linestyle(), "", "", p.get_edgecolor()) for p in outlines]
    for one, other in itertools.combinations(looks, 2):
        assert one[:4] != other[:4] or abs(luminance(one[4]) - luminance(other[4])) > 0.15, f"{one} and {other} in grey"
    return len(looks)


def line(ax, label):
    (found,) = [each for each in ax.lines if each.get_label().startswith(label)]
    return np.stack(found.get_data()).astype(float)


def steps_of(ax, i=0):
    """Heights of the outlined histogram."""
    outline = [p for p in ax.patches if isinstance(p, plt.Polygon)][i]
    return outline.get_xy()[1:-1:2, 1]


def heights(ax):
    return np.array([p.get_height() for p in ax.patches if isinstance(p, plt.Rectangle)])


# The door


def test_matplotlib_has_one_door_that_opens_late():
    folder = Path(plots.__file__).parent
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = [n for node in tree.body if ast.unparse(node).startswith("if TYPE_CHECKING") for n in ast.walk(node)]
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and n not in for_types]
        names = {a.name for n in imports for a in n.names} | {getattr(n, "module", None) or "" for n in imports}
        assert path.name == "_style.py" or not any("matplotlib" in name for name in names)
        assert not any(
            "matplotlib" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        )


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (lambda: plots.plot_energy(GAUSSIAN), lambda: plots.plot_rank({"x": np.zeros((2, 5))})):
        with pytest.raises(ImportError, match=r"numpyro-ebm\[plots\]"):
            draw()


# Energies


@pytest.mark.parametrize("kind", ["energy", "base", "normalised"])
def test_levels_are_nats_below_the_top(kind):
    base = dist.Normal(0, 1).expand([2]).to_event(1)
    flat = ebm.EnergyDistribution(lambda x: 0.0 * x[0], (2,), base=base)
    ax = plots.plot_energy({"energy": GAUSSIAN, "base": flat, "normalised": base}[kind], limits=(-4.0, 4.0), num_points=101)
    lines = ax.collections[1]
    np.testing.assert_allclose(lines.levels, np.linspace(-10, 0, 11))
    for level, path in list(zip(lines.levels, lines.get_paths(), strict=True))[2:-1]:  # lower ones leave the panel
        np.testing.assert_allclose(np.linalg.norm(path.vertices, axis=1), np.sqrt(-2 * level), rtol=0.01)
    assert "nats" in ax.figure.axes[1].get_ylabel()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x1", "x2")


def test_a_row_has_a_landscape_of_its_own():
    centres = jnp.array([[0.0, 0.0], [2.0, -1.0]])
    d = ebm.EnergyDistribution(lambda x, c: jnp.sum((x - c) ** 2), (2,), context=centres, batch_shape=(2,))
    ax = plots.plot_energy(d, row=1, limits=(-5.0, 5.0), num_points=101, names=("a (cm)", "b (cm)"))
    for inner in (ax.collections[0].get_paths()[-1], ax.collections[1].get_paths()[-2]):
        np.testing.assert_allclose(inner.vertices.mean(axis=0), [2.0, -1.0], atol=0.05)
    assert ax.get_xlabel() == "a (cm)"


def test_nothing_outside_the_support_is_evaluated():
    seen = []

    def energy(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return jnp.sum(x - jnp.log(x))

    d = ebm.EnergyDistribution(energy, (2,), support=constraints.positive)
    ax = plots.plot_energy(d, limits=(-2.0, 3.0), num_points=8)
    jax.effects_barrier()
    assert np.concatenate(seen).min() > 0
    vertices = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    assert vertices.min() > 0


def test_one_dimension_is_a_density_beside_histograms():
    d = ebm.EnergyDistribution(lambda x: 2.0 * x**2)
    x = np.random.default_rng(0).normal(0, 0.5, (2, 500))
    ax = plots.plot_energy(d, data=x[0], draws=x[1], chains=x + 1, limits=(-3, 3))
    at, density = line(ax, r"$\exp")
    np.testing.assert_allclose(density, norm.pdf(at, scale=0.5), atol=1e-4)
    edges = np.linspace(-3, 3, 51)
    np.testing.assert_allclose(heights(ax), np.histogram(x[0], edges, density=True)[0])
    np.testing.assert_allclose(steps_of(ax, 0), np.histogram(x[1], edges, density=True)[0])
    np.testing.assert_allclose(steps_of(ax, 1), np.histogram(x + 1, edges, density=True)[0], atol=1e-3)
    assert check_grey(ax) == 3
    assert ax.get_ylabel() == "density (per unit of x)"


def test_chains_are_paths_that_differ_without_colour():
    chains = np.random.default_rng(0).normal(size=(6, 20, 2))
    figure, axes = plt.subplots(1, 2)
    ax = plots.plot_energy(GAUSSIAN, axes[1], chains=chains, data=chains[0], draws=chains[1], num_points=20)
    assert ax is axes[1]
    assert not axes[0].has_data()
    assert plt.get_fignums() == [figure.number]
    for i, path in enumerate(chains):
        np.testing.assert_allclose(line(ax, f"chain {i + 1}"), path.T)
    assert check_grey(ax) == 8
    low, high = ax.get_xlim()
    assert low < chains[..., 0].min()
    assert high > chains[..., 0].max()
    plots.plot_energy(GAUSSIAN, ax, num_points=10)  # on what is there already


ENERGY_FAULTS = {
    "one or two numbers": lambda: plots.plot_energy(ebm.EnergyDistribution(lambda x: jnp.sum(x), (3,))),
    "is discrete": lambda: plots.plot_energy(ebm.EnergyDistribution(lambda x: x, support=constraints.boolean)),
    "row=0": lambda: plots.plot_energy(ebm.EnergyDistribution(lambda x, c: c * x**2, context=jnp.ones(3), batch_shape=(3,))),
    "no row 3": lambda: plots.plot_energy(
        ebm.EnergyDistribution(lambda x, c: c * x**2, context=jnp.ones(3), batch_shape=(3,)), row=3
    ),
    "up to 6 chains": lambda: plots.plot_energy(GAUSSIAN, chains=np.zeros((7, 5, 2))),
    "chain\\[None\\]": lambda: plots.plot_energy(GAUSSIAN, chains=np.zeros((7, 2))),
    "data of shape": lambda: plots.plot_energy(GAUSSIAN, data=np.zeros((7, 3))),
    "low < high": lambda: plots.plot_energy(GAUSSIAN, limits=(1, 0)),
    "No point of the grid": lambda: plots.plot_energy(
        ebm.EnergyDistribution(lambda x: x, support=constraints.positive), limits=(-2, -1)
    ),
    "no finite log density": lambda: plots.plot_energy(ebm.EnergyDistribution(lambda x: jnp.inf + x), limits=(-2, -1)),
    "no finite points": lambda: plots.plot_energy(GAUSSIAN, data=np.full((3, 2), np.nan)),
    "2 names": lambda: plots.plot_energy(GAUSSIAN, names=["x"]),
    "depth": lambda: plots.plot_energy(GAUSSIAN, depth=0.0),
}


@pytest.mark.parametrize("text", ENERGY_FAULTS)
def test_faults_of_energies(text):
    with pytest.raises(ebm.EnergyError, match=text):
        ENERGY_FAULTS[text]()


def test_what_is_no_energy_or_no_axes():
    with pytest.raises(TypeError, match="EnergyDistribution"):
        plots.plot_energy(lambda x: x)
    with pytest.raises(TypeError, match="only a score"):
        plots.plot_energy(ebm.ScoreDistribution(lambda x: -x, (2,)))
    with pytest.raises(TypeError, match="ax from matplotlib"):
        plots.plot_energy(GAUSSIAN, plt)


# Data against draws


def test_marginals_are_densities_over_the_range_of_the_data():
    rng = np.random.default_rng(0)
    data, draws = rng.normal(size=(300, 5)), rng.normal(size=(2, 200, 5))
    data[3, 0], draws[0, :, 1], draws[1, :40, 2] = np.nan, 50.0, np.nan
    axes = plots.plot_marginals(data, draws, bins=20)
    assert axes.shape == (5,)
    assert len(axes[0].figure.axes) == 5
    for i, ax in enumerate(axes):
        x = data[np.isfinite(data[:, i]), i]
        pad = 0.15 * (x.max() - x.min())
        edges = np.linspace(x.min() - pad, x.max() + pad, 21)
        np.testing.assert_allclose(heights(ax), np.histogram(x, edges, density=True)[0])
        counts = np.histogram(draws[..., i], edges)[0]
        np.testing.assert_allclose(steps_of(ax), counts / 400 / (edges[1] - edges[0]))
        assert ax.get_xlabel() == f"x{i + 1}"
    assert axes[0].get_ylabel() == "density"
    assert axes[1].get_title(loc="right") == "50% of draws outside"
    assert axes[2].get_title(loc="right") == "10% of draws outside"
    assert axes[3].get_title(loc="right") == ""
    assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == ["data", "draws"]
    assert luminance(axes[0].patches[0].get_facecolor()) > luminance(axes[0].patches[-1].get_edgecolor()) + 0.3


def test_names_come_from_coordinates_and_choose_dimensions():
    draws = xarray.DataArray(
        np.zeros((2, 10, 3)), dims=("chain", "draw", "part"), coords={"part": ["acid", "salt", "sugar"]}
    )
    axes = plots.plot_marginals(np.ones((4, 3)), draws, dims=["sugar", 0])
    assert [ax.get_xlabel() for ax in axes] == ["sugar", "acid"]
    with pytest.raises(ebm.EnergyError, match="Did you mean 'salt'"):
        plots.plot_marginals(np.ones((4, 3)), draws, dims=["salz"])


def test_whole_numbers_have_a_bin_each():
    rng = np.random.default_rng(0)
    data, draws = rng.integers(0, 3, (100,)), rng.integers(0, 3, (2, 50))
    (ax,) = plots.plot_marginals(data, draws, plt.subplots()[1])
    np.testing.assert_allclose(heights(ax), np.r_[0, np.bincount(data, minlength=3), 0] / 100)
    np.testing.assert_allclose(steps_of(ax), np.r_[0, np.bincount(draws.reshape(-1), minlength=3), 0] / 100)
    assert len(ax.get_legend().get_texts()) == 2


def test_pairs_hold_their_share_of_the_draws():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 2000, 3)) @ np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0]])
    draws[..., 0] = np.exp(0.5 * draws[..., 0])  # so that it is not the same the other way round
    data = draws[0, ::2]
    axes = plots.plot_pairs(data, draws, names=["a", "b", "c"], max_points=100)
    assert axes.shape == (3, 3)
    assert [ax.axison for ax in axes[0]] == [True, False, False]
    ax = axes[1, 0]
    (dots,) = ax.lines
    assert len(dots.get_xdata()) == 100
    assert {tuple(point) for point in np.stack(dots.get_data(), 1)} <= {tuple(row) for row in data[:, :2]}
    assert len(ax.collections) == 2
    for share, region in zip((0.9, 0.5), ax.collections, strict=True):
        inside = Outline(region.get_paths()[0].vertices).contains_points(draws[..., :2].reshape(-1, 2))
        assert abs(inside.mean() - share) < 0.03
    styles = [region.get_linestyle()[0][1] for region in ax.collections]
    assert (styles[0] is None) != (styles[1] is None)
    assert [ax.get_xlabel() for ax in axes[2]] == ["a", "b", "c"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["density", "b", "c"]
    np.testing.assert_allclose(axes[2, 1].get_xlim(), axes[1, 1].get_xlim())


def test_draws_are_taken_as_sample_and_mcmc_give_them():
    """The picture is that of the array in them, and of several variables one has to be chosen."""
    array = np.random.default_rng(0).normal(size=(3, 50, 2))
    draws = ebm.Draws({"x": jnp.asarray(array)}, {}, ebm.MALA())
    data = array.reshape(-1, 2)[::2]

    def drawn(plot, *args, **options):
        axes = np.asarray(plot(*args, **options), dtype=object).reshape(-1)
        lines = [line.get_xydata() for ax in axes for line in ax.lines]
        return np.concatenate([*lines, *(patch.get_path().vertices for ax in axes for patch in ax.patches), [[0, 0]]])

    for plot, given in (
        (plots.plot_marginals, lambda x: (data, x)),
        (plots.plot_pairs, lambda x: (data, x)),
    ):
        np.testing.assert_allclose(drawn(plot, *given(draws)), drawn(plot, *given(array)), rtol=1e-5)
    for name in ("draws", "chains"):
        pictures = [drawn(plots.plot_energy, GAUSSIAN, **{name: given}, limits=(-3, 3)) for given in (draws, array)]
        np.testing.assert_allclose(*pictures, rtol=1e-5)
    images = [plots.plot_images(each, image_shape=(2, 1))[0].images[0].get_array() for each in (draws, array)]
    np.testing.assert_allclose(*images, rtol=1e-5)
    several = ebm.Draws({"x": array, "y": array}, {}, ebm.MALA())
    with pytest.raises(ebm.EnergyError, match=r"are \['x', 'y'\]. Write draws.get_samples\(\)\['x'\]"):
        plots.plot_pairs(data, several)


def test_pairs_of_draws_that_stand_still():
    axes = plots.plot_pairs(np.random.default_rng(0).normal(size=(50, 2)), np.full((30, 2), 0.3))
    assert len(axes[1, 0].collections) == 2
    for region in axes[1, 0].collections:
        vertices = region.get_paths()[0].vertices
        assert len(vertices) > 3
        assert np.abs(vertices - 0.3).max() < 0.25


def test_pairs_without_draws_in_the_panel_lack_contours():
    data = np.random.default_rng(0).normal(size=(50, 2))
    axes = plots.plot_pairs(data, data + 100.0, plt.subplots(2, 2)[1])
    assert not axes[1, 0].collections
    assert axes[0, 0].get_title(loc="right") == "100% of draws outside"


COLUMN_FAULTS = {
    "draws of shape": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 2))),
    "up to 24": lambda: plots.plot_marginals(np.zeros((4, 25)), np.zeros((4, 25))),
    "up to 8": lambda: plots.plot_pairs(np.zeros((4, 9)), np.zeros((4, 9))),
    "two dimensions": lambda: plots.plot_pairs(np.zeros(4), np.zeros(4)),
    "a name for each of 3": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 3)), names=["a"]),
    "for 3 dimensions": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 3)), dims=[3]),
    "list of indices": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 3)), dims="x1"),
    "finite value in each": lambda: plots.plot_marginals(np.full((4, 3), np.nan), np.zeros((4, 3))),
    "at least one value": lambda: plots.plot_marginals(np.zeros((0, 3)), np.zeros((4, 3))),
    "on 3 axes here; got 2": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 3)), plt.subplots(1, 2)[1]),
    "bins": lambda: plots.plot_marginals(np.zeros((4, 3)), np.zeros((4, 3)), bins=0),
}


@pytest.mark.parametrize("text", COLUMN_FAULTS)
def test_faults_of_columns(text):
    with pytest.raises(ebm.EnergyError, match=text):
        COLUMN_FAULTS[text]()
    with pytest.raises(TypeError, match="real numbers"):
        plots.plot_marginals(["a", "b"], np.zeros(3))


# Training

LOSSES = np.random.default_rng(0).normal(size=200).cumsum() + 100
RESULT = ebm.FitResult({}, None, LOSSES, np.array([9.0, 4.0, 5.0]), np.array([0, 100, 200]), 100, "patience")  # pyright: ignore


def test_losses_running_mean_and_the_best_check():
    top, bottom = plots.plot_training(RESULT, window=10)
    np.testing.assert_allclose(line(top, "each update"), [np.arange(1, 201), LOSSES])
    at, mean = line(top, "mean of 10")
    assert at[0] == 10
    np.testing.assert_allclose(mean[[0, -1]], [LOSSES[:10].mean(), LOSSES[-10:].mean()])
    np.testing.assert_allclose(line(bottom, "held-out"), [[0, 100, 200], [9, 4, 5]])
    np.testing.assert_allclose(line(bottom, "best: step 100")[0], 100)
    assert (top.get_ylabel(), bottom.get_xlabel()) == ("loss (sum over rows)", "updates (steps)")
    assert top.get_title(loc="left") == "stopped: patience"
    assert check_grey(top) + check_grey(bottom) == 4


def test_losses_of_one_row_share_a_panel():
    (ax,) = plots.plot_training(RESULT, num_rows=(20, 4))
    np.testing.assert_allclose(line(ax, "each update")[1], LOSSES / 20)
    np.testing.assert_allclose(line(ax, "held-out")[1], [9 / 4, 1.0, 5 / 4])
    assert ax.get_ylabel() == "loss (per row)"
    assert check_grey(ax) == 4


def test_results_of_svi_run_and_losses_that_are_not_finite():
    losses = np.where(np.arange(200) == 150, np.inf, LOSSES)
    (ax,) = plots.plot_training(SimpleNamespace(losses=losses), plt.subplots()[1], window=5)
    assert np.isnan(line(ax, "mean of")[1]).sum() == 5


RECORDS = [
    unknown(ebm.MALA(), ())._replace(energy_gap=jnp.array(g), acceptance_rate=jnp.array(a))
    for g, a in [(3.0, 0.2), (1, 0.5), (0, 0.9)]
]
HEALTH = {
    "sequence": RECORDS,
    "stacked": jax.tree.map(lambda *leaves: jnp.stack(leaves), *RECORDS),
    "dict": {"energy_gap": [3.0, 1.0, 0.0], "acceptance_rate": np.array([0.2, 0.5, 0.9])},
}


@pytest.mark.parametrize("kind", HEALTH)
def test_health_of_chains_over_the_checks(kind):
    axes = plots.plot_training(RESULT, health=HEALTH[kind])
    assert [ax.get_ylabel() for ax in axes[2:]] == ["energy gap (nats)", "acceptance rate"]
    for ax, values in zip(axes[2:], ([3, 1, 0], [0.2, 0.5, 0.9]), strict=True):
        np.testing.assert_allclose(np.stack(ax.lines[0].get_data()), [[0, 100, 200], values], rtol=1e-6)
    assert axes[3].get_ylim() == (-0.02, 1.02)


def test_health_at_every_update_and_at_steps_of_its_own():
    gaps = LOSSES / 10
    ax = plots.plot_training(RESULT, health={"energy_gap": gaps})[-1]
    np.testing.assert_allclose(np.stack(ax.lines[0].get_data()), [np.arange(1, 201), gaps])
    ax = plots.plot_training(RESULT, health={"energy_gap": [1.0, 2.0]}, health_steps=[7, 9])[-1]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [7, 9])


@pytest.mark.slow
def test_the_health_that_fit_kept_is_drawn_by_itself():
    def model(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

    svi = SVI(ebm.estimate(model, "cd"), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    result = ebm.fit(jax.random.key(0), svi, 30, jnp.linspace(-1, 1, 20), check_every=10, progress_bar=False)
    assert result.health.steps.tolist() == [10, 20, 30]
    last = result.state.mutable_state["x$cd"]["state"].health
    jax.tree.map(lambda kept, now: np.testing.assert_array_equal(kept[-1], now), result.health.sites["x"], last)
    axes = plots.plot_training(result)
    np.testing.assert_allclose(axes[-1].lines[0].get_data(), [[10, 20, 30], result.health.sites["x"].acceptance_rate])
    two = result._replace(health=ebm.RecordedHealth({"x": RECORDS[0], "y": RECORDS[0]}, np.array([1])))
    with pytest.raises(ebm.EnergyError, match="site='x'"):
        plots.plot_training(two)
    with pytest.raises(ebm.EnergyError, match="Did you mean 'x'|no health of a site 'z'"):
        plots.plot_training(two, site="z")


def test_faults_of_training():
    with pytest.raises(ebm.EnergyError, match="health_steps as long"):
        plots.plot_training(RESULT, health={"energy_gap": [1.0, 2.0]})
    with pytest.raises(ebm.EnergyError, match="without health"):
        plots.plot_training(RESULT, health_steps=[1])
    with pytest.raises(ebm.EnergyError, match="window=201 for 200 updates"):
        plots.plot_training(RESULT, window=201)
    with pytest.raises(ebm.EnergyError, match="num_rows as two"):
        plots.plot_training(RESULT, num_rows=3)
    with pytest.raises(TypeError, match="result of fit"):
        plots.plot_training(LOSSES)
    with pytest.raises(TypeError, match="'energy_gap' or"):
        plots.plot_training(RESULT, health={"gap": [1.0]})


# Log Z


def make_bounds(gap, rows=()):
    betas = np.broadcast_to(np.linspace(0, 1, 11), (*rows, 11))
    forward, reverse = 3 * betas, (3 + np.asarray(gap)[..., None]) * betas
    lower, upper = (
        ebm.LogPartition(path[..., -1], np.full(rows, error), np.full(rows, 50.0), bound)
        for path, error, bound in ((forward, 0.3, "lower"), (reverse, 0.4, "upper"))
    )
    return ebm.LogPartitionBounds(lower, upper, betas, forward, reverse)


@pytest.mark.parametrize(
    ("gap", "title"), [(0.5, "gap 0.50 ± 0.50 nats"), (2.0, "gap 2.00 ± 0.50 nats: do not report a likelihood")]
)
def test_both_paths_and_their_gap(gap, title):
    bounds = make_bounds(gap)
    top, bottom = plots.plot_annealing(bounds)
    np.testing.assert_allclose(line(top, "forward"), [bounds.betas, bounds.forward])
    np.testing.assert_allclose(line(top, "reverse"), [bounds.betas, bounds.reverse])
    assert top.get_title() == title
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), bounds.reverse - bounds.forward)
    ends = [np.ptp(np.concatenate(c.get_segments()), axis=0)[1] for c in (*top.collections, *bottom.collections)]
    np.testing.assert_allclose(ends, [0.6, 0.8, 1.0])
    assert "nats" in top.get_ylabel() + bottom.get_ylabel()
    assert check_grey(top) == 2


def test_a_row_of_annealing_and_a_gap_that_is_not_known():
    axes = plt.subplots(1, 2)[1]
    top, _ = plots.plot_annealing(make_bounds(np.array([0.1, np.nan]), rows=(2,)), axes, row=1)
    assert top is axes[0]
    assert "do not report" in top.get_title()
    with pytest.raises(ebm.EnergyError, match="row=0"):
        plots.plot_annealing(make_bounds(0.1, rows=(2,)))
    with pytest.raises(ebm.EnergyError, match="no row 2"):
        plots.plot_annealing(make_bounds(0.1, rows=(2,)), row=2)
    with pytest.raises(ebm.EnergyError, match="one path"):
        plots.plot_annealing(make_bounds(0.1), row=0)
    with pytest.raises(TypeError, match="LogPartitionBounds"):
        plots.plot_annealing(3.0)


# Chains, by ArviZ

CHAINS = np.random.default_rng(0).normal(size=(6, 60, 2))


@pytest.mark.parametrize("kind", ["dict", "draws", "arviz"])
def test_rank_plots_have_a_panel_per_entry(kind):
    draws = {
        "dict": {"x": CHAINS},
        "draws": ebm.Draws({"x": jnp.asarray(CHAINS)}, {}, None),  # pyright: ignore[reportArgumentType]
        "arviz": ebm.to_arviz({"x": CHAINS}),
    }[kind]
    axes = plots.plot_rank(draws)
    assert axes.shape == (2,)
    for ax in axes:
        if IS_OLD:
            assert len(heights(ax)) % 6 == 0
        else:
            assert len({str(each._unscaled_dash_pattern) for each in ax.lines[:6]}) == 6
    assert [ax.get_title() for ax in axes] == ["x\n0", "x\n1"]


def test_trace_plots_show_the_draws_chain_by_chain():
    axes = plots.plot_trace({"x": CHAINS, "y": CHAINS[..., 0]}, var_names=["x"], coords={"x_dim_0": [1]})
    assert axes.shape == (1, 2)
    drawn = [each for each in axes[0, 1].lines if len(each.get_xdata()) == 60]
    np.testing.assert_allclose([each.get_ydata() for each in drawn], CHAINS[..., 1])
    assert len({str(each._unscaled_dash_pattern) for each in drawn}) == 6


def test_another_group_of_arviz_data():
    data = ebm.to_arviz({"x": CHAINS}, posterior_predictive={"y": CHAINS[..., 0]})
    assert plots.plot_rank(data, group="posterior_predictive").shape == (1,)


CHAIN_FAULTS = {
    "no group 'prior'": {"group": "prior"},
    "no variable 'z'": {"var_names": ["z"]},
    "no coordinates": {"coords": {"x_dim_0": [5]}},
}


@pytest.mark.parametrize("text", CHAIN_FAULTS)
def test_faults_of_chains(text):
    with pytest.raises(ebm.EnergyError, match=text):
        plots.plot_trace({"x": CHAINS}, **CHAIN_FAULTS[text])


def test_too_many_panels():
    with pytest.raises(ebm.EnergyError, match="21 panels"):
        plots.plot_rank({"x": np.zeros((2, 5, 21))})


# Images


def test_images_lie_in_reading_order_on_one_scale():
    images = np.arange(5 * 2 * 3, dtype=float).reshape(5, 2, 3)
    left, right = plots.plot_images(images.reshape(5, 6), data=images[:2] + 11, image_shape=(2, 3), num_columns=3)
    assert (left.get_title(), right.get_title()) == ("data", "draws")
    assert right.get_xlabel() == left.get_xlabel() == "black 0, white 29"
    picture = np.asarray(right.images[0].get_array())
    assert picture.shape == (5, 11)
    for i in range(5):
        row, column = divmod(i, 3)
        np.testing.assert_allclose(picture[3 * row : 3 * row + 2, 4 * column : 4 * column + 3], images[i] / 29)
    np.testing.assert_allclose(picture[:2, 3], 0.5)
    np.testing.assert_allclose(picture[3:, 8:], 1.0)
    assert right.images[0].get_clim() == (0.0, 1.0)


def test_only_what_fits_the_grid_and_colours_as_they_are():
    images = np.random.default_rng(0).uniform(0.2, 0.8, (9, 4, 4, 3))
    (ax,) = plots.plot_images(images, plt.subplots()[1], num_rows=1, num_columns=2)
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape == (4, 9, 3)
    np.testing.assert_allclose(picture[:, 5:], images[1])
    (ax,) = plots.plot_images(images[..., 0])
    assert ax.images[0].get_array()[~np.isin(ax.images[0].get_array(), [0.5, 1.0])].min() == 0.0
    (ax,) = plots.plot_images(images[..., 0], limits=(0.4, 0.6))
    assert ax.images[0].get_array().min() == 0.0
    (ax,) = plots.plot_images(np.ones((2, 3, 3)))
    assert ax.get_xlabel() == "black 0.5, white 1.5"


IMAGE_FAULTS = {
    "image_shape=\\(height": lambda: plots.plot_images(np.zeros((4, 3))),
    "or \\(..., 16\\)": lambda: plots.plot_images(np.zeros((4, 9)), image_shape=(4, 4)),
    "height, width, 3": lambda: plots.plot_images(np.zeros((4, 9)), image_shape=(9,)),
    "one shape": lambda: plots.plot_images(np.zeros((4, 3, 3)), data=np.zeros((4, 3, 4))),
    "low < high": lambda: plots.plot_images(np.zeros((4, 3, 3)), limits=(1, 1)),
    "no finite value": lambda: plots.plot_images(np.full((4, 3, 3), np.nan)),
    "on 2 axes": lambda: plots.plot_images(np.zeros((4, 3, 3)), plt.subplots()[1], data=np.zeros((4, 3, 3))),
}


@pytest.mark.parametrize("text", IMAGE_FAULTS)
def test_faults_of_images(text):
    with pytest.raises(ebm.EnergyError, match=text):
        IMAGE_FAULTS[text]()


# Noise levels


def test_levels_lengths_of_the_data_and_overlap():
    x = np.random.default_rng(0).normal(size=(50, 3))
    sigmas = ebm.geometric_sigmas(5.0, 0.1, 6)
    top, bottom = plots.plot_noise_levels(sigmas, x)
    np.testing.assert_allclose(line(top, "levels"), [np.arange(1, 7), sigmas])
    apart = np.linalg.norm(x[:, None] - x, axis=-1)
    nearest = np.median(np.where(np.eye(50), np.inf, apart).min(axis=0))
    lengths = [line(top, label)[1, 0] for label in ("largest", "standard", "nearest")]
    np.testing.assert_allclose(lengths, [apart.max(), np.sqrt(x.var(axis=0).mean()), nearest / np.sqrt(3)])
    at, overlap = bottom.lines[0].get_data()
    np.testing.assert_array_equal(at, [2, 3, 4, 5, 6])
    # The law of the noise's length: N(sqrt(d) sigma, sigma^2 / 2), and how much of it is where the upper level's is.
    upper, lower = np.asarray(sigmas[:-1], float), np.asarray(sigmas[1:], float)
    ends = (np.sqrt(3) * upper + side * 3 * upper / np.sqrt(2) for side in (1, -1))
    high, low = (norm.cdf(end, np.sqrt(3) * lower, lower / np.sqrt(2)) for end in ends)
    np.testing.assert_allclose(overlap, high - low, rtol=1e-4)
    assert top.get_yscale() == "log"
    assert check_grey(top) == 4


@pytest.mark.parametrize(
    ("process", "end"), [(ebm.VE(0.01, 10.0), 10.0), (ebm.VP(), np.exp(5.025) * np.sqrt(-np.expm1(-10.05)))]
)
def test_a_process_in_the_unit_of_the_data(process, end):
    (ax,) = plots.plot_noise_levels(process, None, plt.subplots()[1])
    at, levels = line(ax, "noise")
    np.testing.assert_allclose(at[[0, -1]], [process.t_min, 1.0])
    np.testing.assert_allclose(levels[[0, -1]], [0.01, end], rtol=0.05)
    np.testing.assert_allclose(levels[-1], end, rtol=1e-4)
    assert ax.get_xlabel() == "time"


NOISE_FAULTS = {
    "largest level first": lambda: plots.plot_noise_levels([0.1, 1.0]),
    "each positive": lambda: plots.plot_noise_levels([1.0, 0.0]),
    "two finite rows": lambda: plots.plot_noise_levels([1.0, 0.5], np.zeros((1, 2))),
    "data of 2 dimensions": lambda: plots.plot_noise_levels([1.0, 0.5], np.eye(2), dim=3),
    "a process has none": lambda: plots.plot_noise_levels(ebm.VP(), dim=3),
    "on 2 axes": lambda: plots.plot_noise_levels([1.0, 0.5], axes=plt.subplots()[1], dim=3),
}


@pytest.mark.parametrize("text", NOISE_FAULTS)
def test_faults_of_noise_levels(text):
    with pytest.raises(ebm.EnergyError, match=text):
        NOISE_FAULTS[text]()


# Calibration

LOGIT = {p: np.log(p / (1 - p)) for p in (0.15, 0.55, 0.95)}


def test_frequencies_intervals_and_counts():
    counts = {0.15: (2, 18), 0.55: (10, 10), 0.95: (8, 2)}  # data and noise; 20 and 30 in all
    shift = np.log(30 / 20)
    at_data, at_noise = (np.concatenate([np.full(counts[p][k], LOGIT[p]) for p in counts]) + shift for k in (0, 1))
    top, bottom = plots.plot_calibration(at_data, at_noise)
    points = top.containers[0]
    np.testing.assert_allclose(np.stack(points.lines[0].get_data()), [list(counts), [0.1, 0.5, 0.8]], rtol=1e-6)
    for (data, noise), (low, high) in zip(
        counts.values(), [s[:, 1] for s in points.lines[2][0].get_segments()], strict=True
    ):
        n, frequency = data + noise, data / (data + noise)
        for end in (low, high):  # Wilson: the probabilities from which the frequency is 1.96 standard errors away
            np.testing.assert_allclose((end - frequency) ** 2, 1.96**2 * end * (1 - end) / n, rtol=1e-6)
    np.testing.assert_allclose(heights(bottom)[[1, 5, 9]], [2, 10, 8])
    np.testing.assert_allclose(steps_of(bottom)[[1, 5, 9]], [18, 10, 2])
    assert bottom.get_xlabel() == "predicted probability of data"
    assert luminance(bottom.patches[0].get_facecolor()) > 0.5


def test_nu_inside_the_log_ratios_is_taken_out():
    ratios = np.random.default_rng(0).normal(size=(2, 40))
    drawn = [plots.plot_calibration(*(ratios - np.log(nu)), nu=nu)[0].containers[0].lines[0].get_data() for nu in (1, 7)]
    np.testing.assert_allclose(*drawn)


def nce_model(x, mask):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


def test_log_ratios_of_the_true_energy_are_exact_and_calibrated():
    x = np.random.default_rng(0).normal(size=400)
    x[7] = 1e3
    mask = np.arange(400) != 7
    params = {"t": jnp.array(1.0), "x$log_normalizer": jnp.array(0.5 * np.log(2 * np.pi))}
    estimated = ebm.estimate(nce_model, "nce", nu=2, noise=dist.Normal(0.5, 1.5))
    at_data, at_noise = plots.log_ratios(jax.random.key(0), estimated, params, x, mask)
    truth = norm.logpdf(x) - norm.logpdf(x, 0.5, 1.5)
    np.testing.assert_allclose(at_data, truth[mask], rtol=1e-4, atol=1e-4)
    assert at_noise.shape == (2 * 399,)
    top, _ = plots.plot_calibration(at_data, at_noise)
    means, frequencies = top.containers[0].lines[0].get_data()
    sizes = np.histogram(1 / (1 + 2 * np.exp(-np.concatenate([at_data, at_noise]))), np.linspace(0, 1, 11))[0]
    errors = np.sqrt(means * (1 - means) / sizes[sizes > 0])
    assert np.all(np.abs(frequencies - means) < 5 * errors)


@pytest.mark.slow
def test_faults_of_calibration():
    x, mask = np.zeros(3), np.ones(3, bool)
    with pytest.raises(ebm.EnergyError, match="1 NaN in log_ratios_noise"):
        plots.plot_calibration([0.0], [np.nan])
    with pytest.raises(ebm.EnergyError, match="nu > 0"):
        plots.plot_calibration([0.0], [0.0], nu=0.0)
    with pytest.raises(TypeError, match="as estimate returned it"):
        plots.log_ratios(jax.random.key(0), nce_model, {}, x, mask)
    with pytest.raises(TypeError, match="'sm' does not classify"):
        plots.log_ratios(jax.random.key(0), ebm.estimate(nce_model, "sm"), {"t": 1.0}, x, mask)
    estimated = ebm.estimate(nce_model, "nce", noise=dist.Normal(0, 1))
    with pytest.raises(ebm.EnergyError, match="no energy site 'y'"):
        plots.log_ratios(jax.random.key(0), estimated, {"t": 1.0}, x, mask, site="y")
    with pytest.raises(ebm.EnergyError, match="parameters \\['t'\\] have no value"):
        plots.log_ratios(jax.random.key(0), estimated, {}, x, mask)


def test_log_ratios_need_the_parameters_of_the_noise():
    def noise():
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(numpyro.param("log_scale", 0.0))))

    model, x = ebm.estimate(precision_model, "nce", noise=noise, nu=2), np.linspace(-1.0, 1.0, 20)
    with pytest.raises(ebm.EnergyError, match="log_scale.*no value"):
        plots.log_ratios(jax.random.key(0), model, {"t": 1.0}, x)
    at_data, at_noise = plots.log_ratios(jax.random.key(0), model, {"t": 1.0, "log_scale": 0.0}, x)
    assert len(at_noise) == 2 * len(at_data) == 40
