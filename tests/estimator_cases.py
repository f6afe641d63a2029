"""The table of estimators that every invariant runs through: a new estimator adds its row here."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.estimators.names import ESTIMATORS


def normal_proposal():
    numpyro.sample("x", dist.Normal(0.0, jnp.exp(numpyro.param("log_scale", 0.0))))


def quadratic_critic():
    c = numpyro.param("critic", jnp.zeros(2))
    return lambda x: c[0] + c[1] * jnp.sum(x**2)


# Name: options on the Gaussian of the cases, and the tolerance of its precision (maximum likelihood 3.99528).
CASES = {
    "exact": ({}, 5e-3),
    "sm": ({}, 1e-3),
    "ssm": ({"num_projections": 2}, 0.1),
    "ssm_vr": ({"num_projections": 2}, 0.1),
    "fd_ssm": ({"num_projections": 2}, 0.1),
    "regularized_sm": ({"sigma": 0.2}, 1e-3),
    "hsm": ({"weights": (1.0, 0.01)}, 0.1),
    "generalized_sm": ({}, 1e-3),
    "dsm": ({"sigma": 0.2}, 0.1),
    "nce": ({"nu": 5, "noise": dist.Normal(0, 1)}, 0.1),
    "ranking_nce": ({"nu": 5, "noise": dist.Normal(0, 1)}, 0.1),
    "bregman_nce": ({"nu": 5, "noise": dist.Normal(0, 1), "divergence": "exponential"}, 0.1),
    "flow_nce": ({"nu": 5, "noise": normal_proposal}, 0.1),
    "adversarial_nce": ({"nu": 5, "noise": dist.Normal(0, 1), "proposal": normal_proposal}, 0.1),
    "conditional_nce": ({"kappa": 4}, 0.1),
    "shifted_nce": ({"length": 0.3}, 0.1),
    "mpf": ({"num_draws": 4}, 0.1),
    "minimum_velocity": ({}, 0.05),
    "energy_discrepancy": ({"num_negatives": 8}, 0.1),
    "ksd": ({}, 0.15),
    "cd": ({"num_steps": 5}, 0.15),
    "pcd": ({"num_steps": 5}, 0.15),
    "replay": ({"num_steps": 5, "buffer_size": 4000}, 0.15),
    "improved_cd": ({"num_steps": 5, "kernel": ebm.Langevin(step_size=0.01)}, 0.15),
    "mle": ({"num_steps": 6, "kernel": ebm.HMC(0.25, 4, jitter=0.0), "adapt_step_size": False}, 0.15),
    "cooperative": ({"num_steps": 5, "proposal": normal_proposal}, 0.15),
    "adversarial": ({"proposal": normal_proposal}, 0.15),
    "f_ebm": ({"num_steps": 5, "critic": quadratic_critic}, 0.15),
    "lsd": ({}, 0.15),
    "unbiased": ({"burn_in": 2, "num_steps": 5, "kernel": ebm.MALA(0.25), "num_chains": 200, "start": "data"}, 0.15),
}


class Other(NamedTuple):
    """An estimator that the Gaussian is no model for: a model with a parameter t, its data, where t ends, what refuses."""

    options: dict
    model: Any
    data: Any
    truth: float
    tolerance: float
    refusal: str
    role: str = "gradient"
    context: Any = None


def units_model(x):
    """Independent binary units of logit t."""
    t = numpyro.param("t", 0.0)
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(lambda x: -t * jnp.sum(x), x.shape[1:], support=constraints.boolean)
        numpyro.sample("x", d, obs=x)


def field_model(x):
    """Independent pixels of precision t; so are their averages, of t times the number of pixels."""
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), x.shape[1:]), obs=x)


def level_model(x):
    """A Gaussian of precision t plus noise of scale sigma."""
    t = numpyro.param("t", 1.0)
    energy = lambda x, sigma: 0.5 * x**2 / (1 / t + sigma**2)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=SMALLEST), obs=x)


SMALLEST = jnp.asarray(0.1)
UNITS = np.random.default_rng(0).random((200, 3)) < 0.7
LOGIT = np.log(UNITS.mean() / (1 - UNITS.mean()))
FIELDS = np.random.default_rng(0).normal(0, 0.5, (300, 2, 2)).astype(np.float32)
NUMBERS = np.random.default_rng(0).normal(0, 0.5, 2000).astype(np.float32)

# Name: a model of its own, for binary units, images and noise levels.
OTHERS = {
    "mean_field_cd": Other({}, units_model, UNITS, LOGIT, 1e-3, "binary units"),
    "discrete_fisher": Other({}, units_model, UNITS, LOGIT, 1e-3, "discrete events", "objective"),
    "pseudolikelihood": Other({}, units_model, UNITS, LOGIT, 1e-3, "discrete events", "objective"),
    "ratio_matching": Other({}, units_model, UNITS, LOGIT, 1e-3, "discrete events", "objective"),
    "multigrid_cd": Other(
        # Maximum likelihood over both grids: 5 pixels a row, over the sums of squares of both.
        {"factors": (2, 1), "num_steps": 3, "kernel": ebm.HMC(0.25, 3), "adapt_step_size": False},
        field_model,
        FIELDS,
        5 / (np.mean(np.sum(FIELDS**2, (1, 2))) + 4 * np.mean(FIELDS.mean((1, 2)) ** 2)),
        0.2,
        r"needs images, event_shape=\(H, W\)",
    ),
    "diffusion_recovery": Other(
        {"sigmas": (0.1, 0.3, 0.8), "num_steps": 5, "kernel": ebm.HMC(0.4, 3, jitter=0.0), "adapt_step_size": False},
        level_model,
        NUMBERS,
        1 / np.mean(NUMBERS**2),  # the optimum at every level
        0.15,
        "needs a model conditioned on the noise level",
        context=SMALLEST,
    ),
    "multiscale_dsm": Other(
        {"sigmas": (0.8, 0.3, 0.1)},
        level_model,
        NUMBERS,
        1 / np.mean(NUMBERS**2),  # the optimum at every level
        0.1,
        "needs a model conditioned on the noise level",
        "objective",
        SMALLEST,
    ),
    "tre": Other(
        {"sigmas": (0.1, 0.3, 0.8)},
        level_model,
        NUMBERS,
        1 / np.mean(NUMBERS**2),
        0.15,
        "needs a model conditioned on the noise level",
        "objective",
        SMALLEST,
    ),
}


def continuous_options(site="x", shape=()):
    """By name, options under which each estimator runs on real vectors: the defaults, where the class has them."""

    def proposal():
        numpyro.sample(site, dist.Normal(0, 1).expand(shape).to_event(len(shape)))

    def options_of(name):
        try:
            ESTIMATORS.classes[name]()
        except ebm.EnergyError:
            options = {key: proposal if value is normal_proposal else value for key, value in CASES[name][0].items()}
            return {key: value for key, value in options.items() if key in ("sigma", "noise", "proposal")}
        return {}

    # A distribution of numbers, as a table's row has it, is no noise for an event of another shape.
    return {
        name: {key: value for key, value in options_of(name).items() if not isinstance(value, dist.Distribution)}
        for name in CASES
    }
