"""Checks of a posterior over the parameters of energies, by the kernels that draw auxiliary data."""

from typing import Any

import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.bayes.checks import LONGER
from numpyro_ebm.diagnostics._bounds import normal_bound
from numpyro_ebm.diagnostics._findings import Finding, judge, unchecked
from numpyro_ebm.diagnostics.arviz.statistics import effective_size

NUM_DRAWS = 400
"""Draws of the posterior at which auxiliary data are drawn."""
MOST_LATENTS = 100
"""Most latents for which the Hessian of the posterior is computed."""
LOW_ACCEPTANCE = 0.1
LEAST_MOVE = 0.1
"""Least mean distance of the auxiliary data from the data; independent data are at a distance of about 1.4."""
LONGER_CHAINS = "Use more num_steps, another inner kernel, or exact_sampler, and compare the posteriors."


def check_posterior(mcmc: Any) -> list[Finding]:
    """Check the auxiliary data of a run, and the posterior by further auxiliary data at its draws."""
    fields = mcmc.get_extra_fields()
    found = [_acceptance(fields["inner_accept_prob"]), _move(fields["inner_move"])]
    kernel, state = mcmc.sampler, mcmc.last_state
    samples: Any = mcmc.get_samples(group_by_chain=True)
    draws = {name: samples[name] for name in state.z}
    (num_chains, num_draws), size = next(iter(draws.values())).shape[:2], sum(each[0, 0].size for each in draws.values())
    if size > MOST_LATENTS:
        return [*found, unchecked("auxiliary chains", f"there are {size} latents, more than {MOST_LATENTS}")]
    every = max(1, num_draws // max(4, NUM_DRAWS // num_chains))
    try:
        names, terms = kernel.terms_of_draws(state, {name: value[:, ::every] for name, value in draws.items()})
    except EnergyError as error:
        return [*found, unchecked("auxiliary chains", str(error), "Run the MCMC once more, and diagnose it then.")]
    z, shift, bartlett = (np.asarray(leaf, float) for leaf in terms)
    covariance = np.atleast_2d(np.cov(z.reshape(-1, z.shape[-1]).T))
    to_latents = covariance / np.sqrt(np.diagonal(covariance))
    biases = shift @ to_latents
    excesses = np.einsum("ki,cnkl,li->cni", to_latents, bartlett, to_latents)
    if np.any(shift):  # exact samplers have none
        found.append(_shift(names, biases, kernel.num_steps))
    return [*found, _bartlett(names, excesses)]


def _acceptance(rates: Any) -> Finding:
    rate = float(np.mean(rates))
    return judge(
        "auxiliary acceptance",
        f"{rate:.2g}, the mean of the inner chains",
        f"at least {LOW_ACCEPTANCE}",
        "The auxiliary data stay near the data, whatever the parameters. Use a smaller step_size of the inner kernel, more "
        "num_warmup, or another inner kernel.",
        is_bad=not rate >= LOW_ACCEPTANCE,
    )


def _move(moves: Any) -> Finding:
    move = float(np.mean(moves))
    return judge(
        "auxiliary move",
        f"the auxiliary data are {move:.2g} standard deviations from the data where their chains started",
        f"at least {LEAST_MOVE}",
        LONGER_CHAINS,
        is_bad=not move >= LEAST_MOVE,
    )


def _shift(names: list[str], biases: Float[np.ndarray, "chains draws d"], num_steps: int) -> Finding:
    mean, ratio = _worst(biases)
    worst = int(np.argmax(abs(ratio)))
    return judge(
        "auxiliary chains",
        f"chains of {num_steps} steps from the data move the posterior mean of '{names[worst]}' by {abs(mean[worst]):.2g} "
        f"standard deviations, compared with {LONGER * num_steps} steps from other starts: {abs(ratio[worst]):.2g} standard "
        "errors",
        f"below {normal_bound(len(names)):.2g} standard errors",
        LONGER_CHAINS,
        is_bad=not abs(ratio[worst]) < normal_bound(len(names)),
    )


def _bartlett(names: list[str], excesses: Float[np.ndarray, "chains draws d"]) -> Finding:
    mean, ratio = _worst(excesses)
    worst = int(np.argmax(abs(ratio)))
    # For a Gaussian posterior whose variance is r times the right one, the term is r**2 - r.
    times = 0.5 + np.sqrt(max(0.25 + mean[worst], 0.0))
    return judge(
        "Bartlett identity",
        f"the posterior variance of '{names[worst]}' is about {times:.2g} times the right one, {abs(ratio[worst]):.2g} "
        "standard errors of the identity from 1",
        f"below {normal_bound(len(names)):.2g} standard errors",
        f"If the chains of the parameters have converged, the auxiliary ones are too short. {LONGER_CHAINS}",
        is_bad=not abs(ratio[worst]) < normal_bound(len(names)),
    )


def _worst(terms: Float[np.ndarray, "chains draws d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return the mean of each term, and its ratio to the standard error by the effective size."""
    num = terms.shape[0] * terms.shape[1]
    sizes = np.clip(effective_size(terms, "mean"), 1.0, num)
    mean, spread = terms.mean((0, 1)), terms.std((0, 1))
    return mean, np.where(spread > 0, mean / np.where(spread > 0, spread / np.sqrt(sizes), 1.0), 0.0)
