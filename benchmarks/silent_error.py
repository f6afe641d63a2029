"""The error that numpyro.factor makes without a warning: the precision of a Gaussian, with and without log Z.

python benchmarks/silent_error.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(0, 0.5, 200).astype(np.float32)


def with_factor():
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    numpyro.factor("e", -jnp.sum(0.5 * t * X**2))


def with_energy(*, log_z):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    energy = lambda x: 0.5 * t * x**2 - (0.5 * jnp.log(t) if log_z else 0.0)  # noqa: E731
    with numpyro.plate("rows", len(X)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, normalized=log_z), obs=X)


def posterior(model, **kwargs):
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0), **kwargs)
    draws = mcmc.get_samples()["t"]
    return f"{draws.mean():.3f} +- {draws.std():.3f}"


def main():
    exact = dist.Gamma(102.0, 1.0 + np.sum(X.astype(float) ** 2) / 2)
    print(f"exact                                  {exact.mean:.3f} +- {np.sqrt(exact.variance):.3f}")
    print(f"numpyro.factor(-energy)                {posterior(with_factor)}")
    print(f"EnergyDistribution with log Z inside   {posterior(with_energy, log_z=True)}")
    try:
        posterior(with_energy, log_z=False)
    except ValueError as error:
        print(f"EnergyDistribution without log Z       {type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
