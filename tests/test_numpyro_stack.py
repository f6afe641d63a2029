"""What the package reads from NumPyro's handlers and call stack, on the installed version: a new one that moves it fails."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    DiscreteHMCGibbs,
    HMCGibbs,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from numpyro.infer.util import log_density

from numpyro_ebm._core import numpyro_stack

KEY = jax.random.key(0)


class Probe(dist.Normal):
    """A normal distribution that records what the package reads while NumPyro computes its log probability."""

    def __init__(self, seen, loc=0.0):
        self.seen = seen
        super().__init__(loc, 1.0)

    def log_prob(self, value):
        """Record, then return the log probability."""
        scorings = list(numpyro_stack.scorings())
        self.seen.append(
            {
                "site": numpyro_stack.site_being_scored(),
                "is_whole": numpyro_stack.is_scored_whole(self),
                "is_training": numpyro_stack.is_training(),
                "is_mcmc": numpyro_stack.is_mcmc(),
                "guide": numpyro_stack.guide_being_built(),
                "num_scorings": len(scorings),
                "args": scorings[0].args if scorings else None,
                "given": numpyro_stack.model_given(scorings[0].model) if scorings else None,
                "gibbs": numpyro_stack.gibbs_sites(scorings[0]) if scorings else None,
            }
        )
        return super().log_prob(value)


class Other(Probe):
    """Another class, for mixtures and the like."""


@pytest.fixture
def seen():
    return []


@pytest.fixture
def users():
    """What uses the value of the log density, as read while the model runs."""
    return []


@pytest.fixture
def model(seen, users):
    def model(x):
        users.append(numpyro_stack.user_of_value())
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        numpyro.sample("x", Probe(seen, loc), obs=x)

    return model


def all_of(seen, key):
    """The one answer that all records share."""
    assert seen
    (answer,) = {repr(each[key]): each[key] for each in seen}.values()
    return answer


def codes(code):
    """Every function in compiled code, methods and inner functions included."""
    inner = [each for each in code.co_consts if inspect.iscode(each)]
    return inner + [each for one in inner for each in codes(one)]


@pytest.mark.parametrize("place", numpyro_stack._SCORING)
def test_a_function_that_scores_a_model_has_the_variables(place):
    module, name = place
    file = Path(numpyro.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")  # funsor need not be installed
    found = [code for code in codes(compile(file.read_text(), file, "exec")) if code.co_name == name]
    models, args, kwargs = numpyro_stack._SCORING[place]
    needed = {*models.split(), args, kwargs}
    assert any(needed <= {*code.co_varnames, *code.co_freevars, *code.co_cellvars} for code in found)


def test_a_call_outside_of_numpyro_scores_nothing(seen):
    Probe(seen).log_prob(0.0)
    assert all_of(seen, "site") is None
    assert all_of(seen, "num_scorings") == 0
    assert not all_of(seen, "is_whole")
    assert not all_of(seen, "is_training")
    assert not all_of(seen, "is_mcmc")
    assert numpyro_stack.user_of_value() is None
    assert all_of(seen, "guide") is None


def test_log_density(seen, model):
    log_density(model, (0.5,), {}, {"loc": 0.1})
    assert all_of(seen, "site") == "x"
    assert all_of(seen, "is_whole")
    assert all_of(seen, "num_scorings") == 1
    assert all_of(seen, "args") == (0.5,)
    assert all_of(seen, "given") is None
    assert not all_of(seen, "is_training")


def test_a_component_is_not_the_whole_site(seen):
    def model():
        components = [Other(seen), dist.Normal(0, 1)]
        numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(jnp.ones(2) / 2), components), obs=0.3)

    log_density(model, (), {}, {})
    assert all_of(seen, "site") == "x"
    assert not all_of(seen, "is_whole")


@pytest.mark.parametrize("wrap", [lambda d: d.mask(True), lambda d: d.expand([1]), lambda d: d.expand([1]).to_event(1)])  # noqa: FBT003
def test_a_wrapped_distribution_is_the_whole_site(seen, wrap):
    log_density(lambda: numpyro.sample("x", wrap(Probe(seen)), obs=jnp.zeros(1)), (), {}, {})
    assert all_of(seen, "is_whole")


@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_mcmc(seen, users, model, kernel):
    MCMC(kernel(model), num_warmup=1, num_samples=1, progress_bar=False).run(KEY, 0.5)
    assert all_of(seen, "site") == "x"
    assert all_of(seen, "is_mcmc")
    assert not all_of(seen, "is_training")
    assert numpyro_stack.SAMPLER in users
    assert all_of(seen, "num_scorings") == 1
    assert all_of(seen, "given") is model


def test_gibbs(seen):
    def model():
        which = numpyro.sample("which", dist.Bernoulli(0.5))
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        numpyro.sample("x", Probe(seen, loc + which), obs=0.3)

    MCMC(DiscreteHMCGibbs(NUTS(model)), num_warmup=1, num_samples=1, progress_bar=False).run(KEY)
    assert all("which" in each["gibbs"] for each in seen)
    seen.clear()

    def update(rng_key, gibbs_sites, hmc_sites):
        return {"which": jnp.ones((), jnp.int32)}

    MCMC(HMCGibbs(NUTS(model), update, ["which"]), num_warmup=1, num_samples=1, progress_bar=False).run(KEY)
    assert all_of(seen, "gibbs") == set()  # a user's own function updates it


@pytest.mark.parametrize(
    ("loss", "user"),
    [
        (Trace_ELBO(), None),
        (Trace_ELBO(num_particles=2), None),
        (TraceMeanField_ELBO(), None),
        (RenyiELBO(alpha=0.5), "RenyiELBO"),
        (TraceGraph_ELBO(), "TraceGraph_ELBO"),
    ],
)
def test_svi(seen, users, model, loss, user):
    svi = SVI(model, AutoNormal(model), optax.sgd(0.1), loss)
    state = svi.init(KEY, 0.5)
    assert {each["guide"] for each in seen} <= {None, "AutoNormal"}
    seen.clear()
    users.clear()
    svi.update(state, 0.5)
    assert all_of(seen, "site") == "x"
    assert all_of(seen, "is_training")
    assert set(users) == {user}
    assert all_of(seen, "guide") is None
    assert all_of(seen, "num_scorings") >= 1


def test_an_autoguide_in_set_up(seen, users, model):
    guide = AutoLaplaceApproximation(model)
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(KEY, 0.5)
    assert {each["guide"] for each in seen} == {"AutoLaplaceApproximation"}
    users.clear()
    guide.sample_posterior(KEY, svi.get_params(state), 0.5)
    assert set(users) == {"AutoLaplaceApproximation"}
