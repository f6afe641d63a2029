"""One table of what a user can get wrong: each is a ValueError or TypeError that says where and what to write."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.laplacian import is_flat
from numpyro_ebm.energies import (
    RBM,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    ExponentialGraphicalModel,
    GaussianGraphicalModel,
    GaussianRBM,
    Graph,
    GraphPotts,
    Ising,
    PoissonGraphicalModel,
    Potts,
)

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def run(estimator="sm", x=X, energy=quadratic, event_shape=(3,), num_rows=None, options=None, **kwargs):
    """A model of one energy site "x" under `estimate`, run once."""

    def model(x):
        with numpyro.plate("rows", num_rows or (1 if x is None else len(x))):
            numpyro.sample("x", ebm.EnergyDistribution(energy, event_shape, **kwargs), obs=x)

    wrapped = ebm.estimate(model, estimator, **(options or {}))
    return numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace(x)


def train_without_data():
    """SVI on a model whose energy site has neither data nor a value of the guide's."""
    model = ebm.estimate(lambda: numpyro.sample("x", ebm.EnergyDistribution(quadratic, (3,))), "sm")
    SVI(model, ebm.empty_guide, optax.adam(0.1), Trace_ELBO()).init(jax.random.key(0))


def with_value(value, row=2):
    x = np.abs(X) + 0.1
    x[row, 1] = value
    return x


POSITIVE = {"support": constraints.positive, "energy": lambda x: jnp.sum(x)}
SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]], np.float32)

# What went wrong: (call, error, words that the message holds).
CASES = {
    # Energy.
    "energy keeps a dimension": (
        lambda: run(energy=lambda x: x**2),
        ValueError,
        r"site 'x'.*returned shape \(3,\).*scalar",
    ),
    "energy of shape (2, 1)": (lambda: run(energy=lambda x: jnp.ones((2, 1))), ValueError, r"site 'x'.*\(2, 1\)"),
    "log_prob with that energy": (
        lambda: ebm.EnergyDistribution(lambda x: x**2, (3,)).log_prob(X),
        ValueError,
        r"returned shape \(3,\).*jnp.sum",
    ),
    "drawing with that energy": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(lambda x: x**2, (3,))),
        ValueError,
        r"returned shape \(3,\)",
    ),
    "energy is no function": (lambda: run(energy=3.0), TypeError, "callable energy"),
    # Declaration.
    "event_shape is a number": (lambda: run(event_shape=3), ValueError, r"event_shape=\(3,\)"),
    "context does not lead with the batch": (
        lambda: run(context=jnp.ones(4), batch_shape=(5,)),
        ValueError,
        "must lead with batch_shape",
    ),
    "base of another event": (lambda: run(base=dist.Normal(0, 1)), ValueError, r"base has event_shape \(\).*\.to_event"),
    "base of another support": (
        lambda: run(base=dist.Gamma(1.0, 1.0).expand([3]).to_event(1)),
        ValueError,
        "base.*support.*the energy has",
    ),
    "base is no distribution": (lambda: run(base=3.0), TypeError, "numpyro distribution"),
    "support of more dimensions than the event": (
        lambda: run(support=constraints.simplex, event_shape=(), x=X[:, 0]),
        ValueError,
        r"event_shape=\(n,\)",
    ),
    # Data.
    "data of another event": (lambda: run(x=np.ones((5, 4))), ValueError, r"site 'x'.*\(5, 4\).*event_shape=\(3,\)"),
    "data of too few dimensions": (lambda: run(x=np.ones(())[None], num_rows=1), ValueError, "site 'x'.*event_shape"),
    "data of another number of rows": (lambda: run(num_rows=4), ValueError, r"site 'x'.*rows \(4,\).*plate"),
    "data that would broadcast": (lambda: run(x=np.ones((5, 1))), ValueError, r"site 'x'.*\(5, 1\)"),
    "NaN without a mask": (lambda: run(x=with_value(np.nan)), ValueError, "site 'x'.*Row 2.*not finite.*mask"),
    "infinite": (lambda: run(x=with_value(np.inf, 4)), ValueError, "site 'x'.*Row 4.*not finite"),
    "outside the support": (lambda: run(x=with_value(-1.0), **POSITIVE), ValueError, "site 'x'.*Row 2.*outside"),
    "on the wall": (lambda: run(x=with_value(0.0), **POSITIVE), ValueError, "site 'x'.*Row 2"),
    "on the boundary of the simplex": (
        lambda: run(x=SIMPLEX, support=constraints.simplex, energy=lambda x: -jnp.sum(jnp.log(x))),
        ValueError,
        "site 'x'.*Row 1.*boundary",
    ),
    "complex data": (lambda: run(x=X.astype(complex)), TypeError, "real numbers"),
    "no data": (lambda: train_without_data(), ValueError, r"site 'x' is not observed.*obs=x"),
    "no data with NUTS": (lambda: ebm.sample(jax.random.key(0), lambda: None), ValueError, "no latent site"),
    "discrete support": (
        lambda: run(x=np.zeros((5, 3)), support=constraints.boolean),
        ValueError,
        "site 'x'.*discrete",
    ),
    "gradient kernel on a discrete support": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(quadratic, (3,), support=constraints.boolean), "mala"),
        ValueError,
        "'mala' cannot sample a discrete support.*Kernels that can",
    ),
    # Estimators.
    "unknown estimator": (lambda: run("dms"), ValueError, "Unknown estimator 'dms'. Did you mean 'dsm'"),
    "unknown option": (lambda: run("dsm", options={"sigmaa": 0.1}), TypeError, "'sigmaa'. Did you mean 'sigma'"),
    "option of another estimator": (lambda: run("cd", options={"step_size": 0.1}), TypeError, "no option 'step_size'"),
    "options beside an object": (
        lambda: run(ebm.ScoreMatching(), options={"sigma": 0.1}),
        TypeError,
        r"ScoreMatching\(sigma=",
    ),
    "options beside a dict": (lambda: run({"x": "sm"}, options={"sigma": 0.1}), TypeError, "dict of estimators"),
    "no model": (lambda: ebm.estimate("sm", "sm"), TypeError, r"estimate\(model, 'cd'\)"),
    "no estimator": (lambda: run(None), TypeError, "estimator as a name or an object"),
    "a class instead of an object": (lambda: run(ebm.ScoreMatching), TypeError, "name or an object"),
    "a site without estimator": (lambda: run({"y": "sm"}), ValueError, "energy site 'x'.*Known names: y"),
    "an estimator without site": (
        lambda: run({"x": "sm", "xx": "sm"}),
        ValueError,
        r"\['xx'\].*Did you mean 'x'|\['xx'\].*Known names: x",
    ),
    "sigma missing": (lambda: run("dsm"), ValueError, r"sigma=0.1"),
    "sigma zero": (lambda: run("dsm", options={"sigma": 0.0}), ValueError, "sigma > 0"),
    "sigma negative": (lambda: run("dsm", options={"sigma": [-1.0, 1.0, 1.0]}), ValueError, "sigma > 0"),
    "sigma NaN": (lambda: run("dsm", options={"sigma": np.nan}), ValueError, "sigma > 0"),
    "sigma of another shape": (lambda: run("dsm", options={"sigma": np.ones(2)}), ValueError, "site 'x'.*sigma has shape"),
    "no noise draws": (lambda: run("nce", options={"nu": 0}), ValueError, "nu >= 1"),
    "negative noise draws": (lambda: run("nce", options={"nu": -2}), ValueError, "nu >= 1"),
    "half a noise draw": (lambda: run("nce", options={"nu": 1.5}), ValueError, "whole number nu"),
    "noise of another event": (
        lambda: run("nce", options={"noise": dist.Normal(0, 1)}),
        ValueError,
        r"site 'x'.*noise has event shape \(\).*to_event",
    ),
    "noise with a batch shape": (
        lambda: run("nce", options={"noise": dist.Normal(np.zeros((4, 3)), 1).to_event(1)}),
        ValueError,
        r"site 'x'.*batch shape \(4,\).*rows \(5,\)",
    ),
    "noise of another support": (
        lambda: run("nce", options={"noise": dist.Gamma(1.0, 1.0).expand([3]).to_event(1)}),
        ValueError,
        "site 'x'.*noise.*support",
    ),
    "noise that cannot be at a datum": (
        lambda: run(
            "nce",
            x=np.full((4, 1), 0.5, np.float32) * [[1], [1], [5], [1]],
            event_shape=(1,),
            support=constraints.interval(0.0, 3.0),
            options={"noise": Truncated()},
        ),
        ValueError,
        "site 'x'.*row 2",
    ),
    "noise is no distribution": (lambda: run("nce", options={"noise": 3.0}), TypeError, "numpyro distribution"),
    "no projections": (lambda: run("ssm", options={"num_projections": 0}), ValueError, "num_projections >= 1"),
    "unknown projection": (lambda: run("ssm", options={"projection": "spheres"}), ValueError, "Did you mean 'sphere'"),
    "no steps": (lambda: run("cd", options={"num_steps": 0}), ValueError, "num_steps >= 1"),
    "half a step": (lambda: run("mle", options={"num_steps": 2.5}), ValueError, "whole number num_steps"),
    "no chains": (lambda: run("pcd", options={"num_chains": 0}), ValueError, "num_chains >= 1"),
    "start of another event": (
        lambda: run("mle", options={"start": dist.Normal(0, 1)}),
        ValueError,
        "site 'x'.*start has event shape",
    ),
    "start is no distribution": (lambda: run("pcd", options={"start": 1.0}), TypeError, "numpyro distribution"),
    "context under nce": (
        lambda: run("nce", energy=lambda x, c: c * quadratic(x), context=jnp.ones(5), batch_shape=(5,)),
        ValueError,
        "site 'x'.*context.*'cd'",
    ),
    # Kernels.
    "unknown kernel": (lambda: run("cd", options={"kernel": "hcm"}), ValueError, "Unknown kernel 'hcm'. Did you mean 'hmc'"),
    "kernel is a number": (lambda: run("cd", options={"kernel": 3}), TypeError, "kernel as a name or an object"),
    "step size zero": (lambda: ebm.MALA(step_size=0.0), ValueError, r"MALA needs step_size > 0"),
    "step size NaN": (lambda: ebm.Langevin(step_size=np.nan), ValueError, "step_size > 0"),
    "no integration steps": (lambda: ebm.HMC(num_integration_steps=0), ValueError, "num_integration_steps >= 1"),
    "mass matrix of another size": (
        lambda: run("cd", options={"kernel": ebm.HMC(inverse_mass_matrix=jnp.ones(2))}),
        ValueError,
        r"inverse_mass_matrix of shape \(3,\)",
    ),
    "no draws": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(quadratic, (3,)), num_samples=0),
        ValueError,
        "num_samples >= 1",
    ),
    "sampler that is no function": (lambda: run(sampler=3), TypeError, "callable sampler"),
    "kernel of a model that is none": (lambda: ebm.BlackJAXKernel(3), TypeError, "NumPyro model"),
    # ArviZ.
    "draws first": (lambda: ebm.to_arviz({"x": np.ones((100,))}), ValueError, r"\(chains, draws\)"),
    "chains and draws that differ": (
        lambda: ebm.to_arviz({"x": np.ones((2, 100)), "y": np.ones((100, 2))}),
        ValueError,
        "same",
    ),
    "nested": (lambda: ebm.to_arviz({"x": {"y": np.ones((2, 100))}}), ValueError, "flat dict"),
    "keys among the draws": (
        lambda: ebm.to_arviz({"x": jax.random.split(jax.random.key(0), (2, 3))}),
        ValueError,
        "random keys",
    ),
    "no draws at all": (lambda: ebm.to_arviz(3), TypeError, "needs an MCMC"),
}


class Truncated(dist.Distribution):
    """Uniform on (0, 1), declared on (0, 3): density zero at some data."""

    support = constraints.independent(constraints.interval(0.0, 3.0), 1)

    def __init__(self):
        super().__init__((), (1,))

    def log_prob(self, value):
        return jnp.where((value > 0) & (value < 1), 0.0, -jnp.inf)[..., 0]

    def sample(self, key, sample_shape=()):
        return jax.random.uniform(key, (*sample_shape, 1))


BITS = np.random.default_rng(1).integers(0, 2, (5, 3))
CODES = np.random.default_rng(2).integers(0, 3, (5, 3))
CODES[0] = [0, 1, 2]
INTERVAL = constraints.integer_interval(0, 2)
TABLE = jnp.arange(4.0)
TWO_ONES = np.eye(3, dtype=int)[CODES]
TWO_ONES[2, 1] = 1


def discrete(x, support, event_shape=(3,), energy=lambda x: 0.1 * jnp.sum(x), ready=None, estimator="pseudolikelihood"):
    """`run` on a discrete support, or with a ready-made energy."""
    if ready is None:
        return run(estimator, x, energy, event_shape, support=support)
    return run(estimator, x, ready, ready.event_shape, support=ready.support)


def set_to(x, index, value):
    x = np.array(x)
    x[index] = value
    return x


def mixed(event):
    support = ebm.Blocks(("y", "s"), (constraints.real, constraints.boolean), ((), (2,)))
    return lambda: run("pseudolikelihood", event, lambda e: jnp.sum(e**2), (3,), support=support)


def weights(*shape, at=None, value=np.nan):
    matrix = np.zeros(shape)
    if at is not None:
        matrix[at] = matrix[at[::-1] if len(at) == 2 else (*at[2:], *at[:2])] = value
    return matrix


def chains(kernel, energy, support=INTERVAL, shape=(3,)):
    d = ebm.EnergyDistribution(energy, shape, support=support)
    return lambda: ebm.sample(jax.random.key(0), d, kernel, num_warmup=1, num_samples=1)


def of_model(kernel, energy, support):
    def model():
        numpyro.sample("x", ebm.EnergyDistribution(energy, (3,), support=support))

    return lambda: ebm.sample(jax.random.key(0), model, kernel, num_warmup=1, num_samples=1)


def by_index(x):
    return TABLE[x[0]] + TABLE[x[1]] * TABLE[x[2]]


def by_cast(x):
    return jnp.sum(TABLE[x.astype(int)])


def by_comparison(x):
    return -jnp.sum(x == 1)


FLOATS = "whole numbers only, as indices do, and got floating-point numbers"
DISCRETE = {
    # Data of another alphabet.
    "spins for bits": (
        lambda: discrete(2 * BITS - 1, constraints.boolean),
        r"site 'x'.*Row \d of.*column \d is -1 .*support=numpyro_ebm.spins, or pass 0 and 1, \(x \+ 1\) // 2",
    ),
    "bits for spins": (lambda: discrete(BITS, ebm.spins), r"column \d is 0 .*pass spins, 2 \* x - 1, or write .*boolean"),
    "categories from 1": (lambda: discrete(CODES + 1, INTERVAL), r"Row 0.*column 2 is 3 .*count from 1: pass x - 1"),
    "a value beyond the last": (
        lambda: discrete(set_to(CODES, (3, 1), 7), INTERVAL),
        r"Row 3.*column 1 is 7 \(1 such rows\).*integer_interval\(0, 7\)",
    ),
    "a value in a lattice": (
        lambda: discrete(set_to(BITS.reshape(5, 3, 1), (3, 1, 0), 7), constraints.boolean, (3, 1)),
        r"Row 3.*entry \(1, 0\) is 7",
    ),
    "a scalar": (lambda: discrete(np.array([0, 1, 5]), constraints.boolean, ()), "Row 2.*: 5 "),
    "fractions": (lambda: discrete(CODES + 0.5, INTERVAL), r"column 0 is 0.5 .*whole numbers; round the data"),
    "NaN among bits": (lambda: discrete(set_to(BITS * 1.0, (2, 1), np.nan), constraints.boolean), "Row 2.*column 1 is NaN"),
    "codes for one-hot": (
        lambda: discrete(CODES, ebm.one_hot, (3, 3)),
        r"site 'x'.*one-hot by jax.nn.one_hot\(x, 3, dtype=int\).*integer_interval\(0, 2\) and event_shape=\(3,\)",
    ),
    "codes for one one-hot vector": (lambda: discrete(CODES, ebm.one_hot), r"\[0 1 2\].*single 1.*jax.nn.one_hot"),
    "one-hot for codes": (
        lambda: discrete(np.eye(3, dtype=int)[CODES], INTERVAL),
        r"site 'x'.*jnp.argmax\(x, -1\).*support=numpyro_ebm.one_hot and event_shape=\(3, 3\)",
    ),
    "one-hot for codes of one site": (lambda: discrete(np.eye(3, dtype=int)[CODES[:, 0]], INTERVAL, ()), "jnp.argmax"),
    "two ones": (
        lambda: discrete(TWO_ONES, ebm.one_hot, (3, 3)),
        r"Row 2.*column 1 is \[1 1 1\]",
    ),
    "a member of several": (mixed(np.array([[0.5, 0, 1], [0.1, 1, 2]])), r"Row 1.*member 's', column 1 is 2.0"),
    # Parameters of energies.
    "a diagonal": (lambda: BoltzmannMachine(np.eye(3)), r"diagonal.*weights \* \(1 - jnp.eye\(3\)\)"),
    "no symmetry": (lambda: BoltzmannMachine(np.triu(np.ones((3, 3)), 1)), "symmetric weights.*from_pairs"),
    "no square": (lambda: BoltzmannMachine(np.ones((3, 2))), r"square weights, \(d, d\); got shape \(3, 2\)"),
    "NaN in weights": (lambda: BoltzmannMachine(weights(3, 3, at=(0, 1))), r"finite weights; got NaN.*weights\[0, 1\]"),
    "biases of another length": (lambda: BoltzmannMachine(np.zeros((3, 3)), np.zeros(2)), r"biases of shape \(3,\)"),
    "a site with itself": (lambda: Potts(np.ones((2, 3, 2, 3))), r"Potts.*site to itself.*jnp.eye\(L\)"),
    "couplings in one order": (
        lambda: Potts(np.triu(np.ones((2, 2)), 1)[:, None, :, None] * np.ones((2, 3, 2, 3))),
        r"Potts.*transpose\(2, 3, 0, 1\)",
    ),
    "NaN in couplings": (lambda: Potts(weights(2, 3, 2, 3, at=(0, 0, 1, 2))), r"couplings\[0, 0, 1, 2\]"),
    "a Potts matrix": (lambda: Potts(np.zeros((6, 6))), r"\(L, q, L, q\); got shape \(6, 6\)"),
    "an asymmetric precision": (
        lambda: GaussianGraphicalModel([[1.0, 0.5], [0.0, 1.0]]),
        "symmetric precision.*precision.T",
    ),
    "an indefinite precision": (
        lambda: GaussianGraphicalModel([[1.0, 2.0], [2.0, 1.0]]),
        "positive definite.*eigenvalue is -1",
    ),
    "NaN in a precision": (lambda: GaussianGraphicalModel([[1.0, np.nan], [np.nan, 1.0]]), r"precision\[0, 1\]"),
    "positive couplings of counts": (lambda: PoissonGraphicalModel([(0, 1)], 0.1), "couplings <= 0.*maximum=100"),
    "negative couplings of waiting times": (lambda: ExponentialGraphicalModel([(0, 1)], -0.1), "couplings >= 0"),
    "a matrix of couplings on a graph": (
        lambda: Ising(Graph.lattice(2, 2), np.zeros((4, 4))),
        r"couplings of shape \(4,\), or one number; got shape \(4, 4\)",
    ),
    "NaN on a graph": (lambda: Ising(Graph.lattice(2, 2), np.nan), "finite couplings"),
    "fields of nodes": (lambda: GraphPotts(Graph.lattice(2, 2), 0.1, 3, np.zeros((4, 3))), r"fields of shape \(2, 2, 3\)"),
    "transposed weights": (lambda: RBM(np.zeros((5, 3)), np.zeros(3), np.zeros(5)), r"visible_biases.*write weights.T"),
    "transposed Gaussian weights": (lambda: GaussianRBM(np.zeros((5, 3)), hidden_biases=np.zeros(5)), "write weights.T"),
    "hidden biases of another length": (lambda: RBM(np.zeros((5, 3)), 0.0, np.zeros(4)), r"hidden_biases of shape \(3,\)"),
    "NaN in an RBM": (lambda: RBM(np.full((5, 3), np.nan)), r"weights\[0, 0\]"),
    "NaN in a Gaussian RBM": (lambda: GaussianRBM(np.full((5, 3), np.nan)), "finite weights"),
    "NaN in a deep machine": (lambda: DeepBoltzmannMachine([np.zeros((2, 2)), np.full((2, 2), np.inf)]), "finite weights"),
    "layers that do not fit": (
        lambda: DeepBoltzmannMachine([np.zeros((3, 2)), np.zeros((3, 2))]),
        r"fit each other.*\(3, 2\)",
    ),
    "data for other weights": (
        lambda: discrete(BITS, None, ready=RBM(np.zeros((5, 3)))),
        r"site 'x'.*\(5, 3\).*event_shape=\(5,\).*the parameters of RBM: change these",
    ),
    # Graphs.
    "an edge out of range": (lambda: Graph([(0, 5)], 3), r"Edge 0 joins \[0, 5\].*0 to 2"),
    "a negative node": (lambda: Ising([(0, -1)], 0.1), r"\[0, -1\]"),
    "an edge to itself": (lambda: Graph([(0, 1), (1, 1)], 3), r"Edge 1 joins node 1 to itself.*edges\[edges"),
    "an edge twice": (lambda: Graph([(0, 1), (1, 0)], 3), r"\[0, 1\] is given 2 times.*np.unique"),
    "an adjacency matrix": (lambda: Ising(1 - np.eye(3, dtype=int), 0.1), r"np.argwhere\(np.triu\(matrix, 1\)\)"),
    "edges of floats": (lambda: Graph([(0.0, 1.0)], 3), r"whole numbers of shape \(num_edges, 2\)"),
    "equal colours of neighbours": (lambda: Graph([(0, 1)], 2, colors=[0, 0]), "neighbours 0 and 1 both have colour 0"),
    "too few colours": (lambda: Graph([(0, 1)], 2, colors=[0]), "one whole number for each of the 2 nodes"),
    # Gradients in the event.
    "an index under a gradient": (chains("gwg", by_index), f"{FLOATS}.*kernel='gibbs' or 'flips' \\('block_gibbs'"),
    "an index under langevin": (chains(ebm.DULA(0.2), by_index), FLOATS),
    "an index on the reals": (chains("mala", by_index, constraints.real), f"{FLOATS}.*integer_interval\\(0, 9\\)"),
    "an index in training": (
        lambda: run("cd", CODES, by_index, support=INTERVAL, options={"kernel": "dmala"}),
        f"site 'x'.*{FLOATS}",
    ),
    "an index under score matching": (lambda: run("sm", energy=by_index), f"site 'x'.*{FLOATS}"),
    "an index in a mixed event": (
        lambda: run("pseudolikelihood", np.c_[X[:, :1], BITS[:, :2]], lambda e: TABLE[e[1]] * e[0], (3,), support=MIXED),
        f"site 'x'.*{FLOATS}.*event\\[2:\\].astype",
    ),
    "a cast under gwg": (chains("gwg", by_cast), "'gwg'.*zero everywhere.*kernel='gibbs' or 'flips'"),
    "a comparison under dula": (chains(ebm.DULA(0.2), by_comparison), "'dula'.*zero everywhere"),
    "a comparison under tempering": (chains(ebm.ParallelTempering("dmala"), by_comparison), "'dmala'.*zero everywhere"),
    "a cast under nuts": (chains("nuts", by_cast, constraints.real), r"'nuts'.*zero everywhere.*integer_interval\(0, 9\)"),
    "a cast under langevin between ends": (
        chains(ebm.Langevin(0.1), by_cast, constraints.positive),
        "'langevin'.*zero everywhere",
    ),
    "a comparison in a model": (of_model("nuts", by_comparison, constraints.real), "site 'x'.*'nuts'.*zero everywhere"),
    "a comparison in a discrete model": (of_model("gwg", by_comparison, INTERVAL), "site 'x'.*'gwg'.*zero everywhere"),
    "a cast in training": (lambda: run("cd", energy=by_cast), "site 'x'.*'mala'.*zero everywhere"),
    **{
        f"a comparison under {name}": (
            lambda name=name, options=options: run(name, energy=by_comparison, options=options),
            "site 'x'.*score.*zero everywhere.*'pseudolikelihood'",
        )
        for name, options in {"sm": {}, "ssm": {}, "ssm_vr": {}, "dsm": {"sigma": 0.1}}.items()
    },
}
MIXED = ebm.Blocks(("y", "s"), (constraints.real, constraints.boolean), ((), (2,)))
CASES |= {name: (call, ValueError, words) for name, (call, words) in DISCRETE.items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, error, words = CASES[name]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_concrete_data_are_checked_inside_jit_too():
    with pytest.raises(ValueError, match="Row 2"):
        jax.jit(lambda t: run(x=with_value(np.nan))["x"]["fn"].log_prob(0) * t)(1.0)


def test_rows_that_are_not_known_yet_give_nan_and_not_a_number():
    def value(x):
        return run(x=x, **POSITIVE)["x"]["fn"].log_prob(x)

    values = jax.jit(value)(with_value(-1.0))
    assert np.isnan(values[2])
    assert np.isfinite(np.delete(values, 2)).all()
    with pytest.warns(ebm.UnhealthyChainsWarning, match="nonfinite"):
        values = jax.block_until_ready(jax.jit(lambda x: run("cd", x=x)["x"]["fn"].log_prob(x))(with_value(np.nan)))
    assert np.isnan(values[2])


def test_a_traced_matrix_of_couplings_counts_with_its_symmetric_part():
    """What cannot be refused while a program is traced gives the energy of a proper matrix, and no other number."""
    matrix, x = np.random.default_rng(0).normal(size=(3, 3)), jnp.array([1, 0, 1])
    proper = 0.5 * (matrix + matrix.T) * (1 - np.eye(3))
    np.testing.assert_allclose(jax.jit(lambda w: BoltzmannMachine(w)(x))(matrix), BoltzmannMachine(proper)(x), rtol=1e-5)
    couplings = np.random.default_rng(1).normal(size=(3, 2, 3, 2))
    proper = 0.5 * (couplings + couplings.transpose(2, 3, 0, 1)) * (1 - np.eye(3))[:, None, :, None]
    np.testing.assert_allclose(jax.jit(lambda w: Potts(w)(x))(couplings), Potts(proper)(x), rtol=1e-5)
    precision = matrix + 5 * np.eye(3)
    proper = 0.5 * (precision + precision.T)
    ours = jax.jit(lambda w: GaussianGraphicalModel(w)(1.0 * x))(precision)
    np.testing.assert_allclose(ours, GaussianGraphicalModel(proper)(1.0 * x), rtol=1e-5)
    assert np.isnan(jax.jit(lambda w: GaussianGraphicalModel(w).log_partition())(jnp.array([[1.0, 2.0], [2.0, 1.0]])))
    assert np.isnan(jax.jit(lambda w: RBM(w)(x))(jnp.full((3, 2), jnp.nan)))


def test_gradients_that_are_zero_by_chance_or_for_a_reason_pass():
    """A constant energy, a table beside a smooth term, and walls over a base are no faults."""
    for energy in (lambda x: jnp.zeros(()), lambda x: by_cast(x) + 0.1 * jnp.sum(x**2), lambda x: 0.0 * jnp.sum(x)):
        ebm.GibbsWithGradients().bind(ebm.EnergyDistribution(energy, (3,), support=INTERVAL))
    walls = lambda x: jnp.where(jnp.sum(x) > -10, 0.0, jnp.inf)  # noqa: E731
    ebm.MALA().bind(ebm.EnergyDistribution(walls, (3,), base=dist.Normal(0, 1).expand([3]).to_event(1)))
    ebm.NUTS().bind(ebm.EnergyDistribution(by_cast, (3,), support=constraints.interval(0.0, 3.0)))
    per_row = ebm.EnergyDistribution(lambda x, c: c * by_cast(x), (3,), context=jnp.ones(4), batch_shape=(4,))
    with pytest.raises(ValueError, match="zero everywhere"):
        ebm.HMC().bind(per_row)


@pytest.mark.parametrize(
    ("function", "flat"),
    [
        (lambda x: jnp.sum(x), False),
        (lambda x: jnp.zeros(()), False),
        (lambda x: jnp.sum(jax.nn.relu(x)), False),
        (lambda x: jnp.sum(TABLE[x.astype(int)]) + x[0], False),
        (by_cast, True),
        (by_comparison, True),
        (lambda x: jnp.sum(jnp.round(x) + jnp.floor(x) * jnp.sign(x)), True),
        (lambda x: jnp.sum(jax.nn.one_hot(x.astype(int), 4) @ TABLE), True),
        (lambda x: jnp.where(jnp.all(jnp.abs(x) < 1), 0.0, jnp.inf), True),
        (lambda x: jax.lax.scan(lambda c, v: (c + TABLE[v.astype(int)], None), 0.0, x)[0], True),
        (jax.jit(lambda x: 1.0 * jnp.argmax(x)), True),
        (lambda x: jax.lax.cond(x[0] > 0, lambda: 1.0, lambda: 0.0), True),
    ],
)
def test_a_flat_function_is_told_by_its_structure(function, flat):
    point = jnp.arange(3.0)
    assert is_flat(function, point) is flat
    assert jax.jit(jax.grad(lambda t: t * is_flat(lambda x: t * function(x), point)))(1.0) == flat
