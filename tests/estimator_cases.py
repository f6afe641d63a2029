"""The table of estimators that every invariant runs through: a new estimator adds its row here."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import numpyro_ebm as ebm
from numpyro_ebm.estimators.names import ESTIMATORS


def normal_proposal():
    numpyro.sample("x", dist.Normal(0.0, jnp.exp(numpyro.param("log_scale", 0.0))))


def quadratic_critic():
    c = numpyro.param("critic", jnp.zeros(2))
    return lambda x: c[0] + c[1] * jnp.sum(x**2)


# Name: options on the Gaussian of the cases, and the tolerance of its precision (maximum likelihood 3.99528).
CASES = {
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

OWN_MODELS = tuple(sorted(set(ESTIMATORS.names()) - set(CASES)))
"""Estimators for binary units, images and noise levels: test_estimators.py gives each of them a model of its own."""


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
