"""Bases with parameters of each row's own: every distribution of NumPyro that has a batch shape."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from helpers import some_slow
from numpyro.distributions import transforms

import numpyro_ebm as ebm
from numpyro_ebm.distributions.bases import split_rows

N = 4
M = jnp.linspace(-0.5, 0.5, N)
S = 1 + M**2
P = jax.nn.sigmoid(M)
PAIR = jnp.stack([P, 1 - P], -1)
VEC = jnp.stack([M, S], -1)
POS = jnp.stack([S, S + 1, S + 2], -1)
SIMPLEX = POS / POS.sum(-1, keepdims=True)
TRIL = jnp.stack([jnp.array([[1.0, 0.0], [0.3 * i, 1.0 + i]]) for i in range(N)])
COV = TRIL @ TRIL.swapaxes(-1, -2)
CORR = jnp.stack([jnp.array([[1.0, 0.1 * i], [0.1 * i, 1.0]]) for i in range(N)])
ADJACENT = jnp.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])

BASES = {
    "asymmetric_laplace": lambda: dist.AsymmetricLaplace(M, S, S),
    "asymmetric_laplace_quantile": lambda: dist.AsymmetricLaplaceQuantile(M, S, P),
    "beta": lambda: dist.Beta(S, 2.0),
    "beta_proportion": lambda: dist.BetaProportion(P, 3.0),
    "car": lambda: dist.CAR(M[:, None] * jnp.ones(3), 0.3 * P, S, ADJACENT),
    "cauchy": lambda: dist.Cauchy(M, S),
    "chi2": lambda: dist.Chi2(S),
    "dirichlet": lambda: dist.Dirichlet(POS),
    "exponential": lambda: dist.Exponential(S),
    "gamma": lambda: dist.Gamma(2.0, S),
    "gaussian_copula_beta": lambda: dist.GaussianCopulaBeta(VEC**2 + 1, VEC**2 + 1, CORR),
    "gaussian_random_walk": lambda: dist.GaussianRandomWalk(S, num_steps=3),
    "gompertz": lambda: dist.Gompertz(S, 2.0),
    "gumbel": lambda: dist.Gumbel(M, S),
    "half_cauchy": lambda: dist.HalfCauchy(S),
    "half_normal": lambda: dist.HalfNormal(S),
    "inverse_gamma": lambda: dist.InverseGamma(S, 2.0),
    "kumaraswamy": lambda: dist.Kumaraswamy(S, 2.0),
    "laplace": lambda: dist.Laplace(M, S),
    "left_truncated": lambda: dist.TruncatedNormal(M, 0.5, low=-1.0),
    "lkj_cholesky": lambda: dist.LKJCholesky(2, S),
    "logistic": lambda: dist.Logistic(M, S),
    "log_normal": lambda: dist.LogNormal(M, S),
    "log_uniform": lambda: dist.LogUniform(1.0 + 0 * S, 2.0),
    "low_rank": lambda: dist.LowRankMultivariateNormal(VEC, VEC[..., None], POS[..., :2]),
    "matrix_normal": lambda: dist.MatrixNormal(jnp.zeros((N, 2, 2)), TRIL, TRIL),
    "mixture_general": lambda: dist.MixtureGeneral(dist.Categorical(PAIR), [dist.Normal(M, S), dist.StudentT(3.0, M, S)]),
    "mixture_same": lambda: dist.MixtureSameFamily(dist.Categorical(SIMPLEX), dist.Normal(POS, 1.0)),
    "mixture_of_vectors": lambda: dist.MixtureSameFamily(
        dist.Categorical(PAIR), dist.Normal(jnp.stack([VEC, VEC + 1], 1), 1.0).to_event(1)
    ),
    "multivariate_normal": lambda: dist.MultivariateNormal(VEC, COV),
    "multivariate_normal_precision": lambda: dist.MultivariateNormal(0.0 * VEC[0], precision_matrix=COV),
    "multivariate_student_t": lambda: dist.MultivariateStudentT(3.0 + S, VEC, TRIL),
    "normal": lambda: dist.Normal(M, 1.0),
    "normal_expanded": lambda: dist.Normal(M[:, None], 1.0).expand((N, 3)).to_event(1),
    "pareto": lambda: dist.Pareto(1.0 + 0 * S, S),
    "power": lambda: dist.TransformedDistribution(dist.Exponential(S), transforms.PowerTransform(S)),
    "projected_normal": lambda: dist.ProjectedNormal(POS),
    "relaxed_bernoulli": lambda: dist.RelaxedBernoulliLogits(1.0 + S, M),
    "right_truncated": lambda: dist.TruncatedNormal(M, 0.5, high=1.0),
    "shifted": lambda: dist.TransformedDistribution(dist.Normal(0, 1.0), transforms.AffineTransform(M, S)),
    "shifted_vector": lambda: dist.TransformedDistribution(
        dist.Normal(VEC, 1.0).to_event(1), [transforms.AffineTransform(VEC, 2.0), transforms.ExpTransform()]
    ),
    "sine_bivariate_von_mises": lambda: dist.SineBivariateVonMises(M, M, S, S, correlation=0.1 * S),
    "soft_laplace": lambda: dist.SoftLaplace(M, S),
    "student_t": lambda: dist.StudentT(3.0, M, 1.0),
    "truncated": lambda: dist.TruncatedNormal(M, 0.5, low=-1.0, high=1.0),
    "truncated_student_t": lambda: dist.TruncatedDistribution(dist.StudentT(3.0, M, S), low=0.0),
    "truncated_vector": lambda: dist.TruncatedNormal(VEC, 0.5, low=-1.0, high=3.0).to_event(1),
    "uniform": lambda: dist.Uniform(0.0 * M, 1.0),
    "von_mises": lambda: dist.VonMises(M, S),
    "weibull": lambda: dist.Weibull(S, 2.0),
    "wishart": lambda: dist.Wishart(3.0 + S, scale_tril=TRIL),
    "bernoulli": lambda: dist.Bernoulli(P),
    "bernoulli_logits": lambda: dist.Bernoulli(logits=M),
    "beta_binomial": lambda: dist.BetaBinomial(S, S, 4),
    "binomial": lambda: dist.Binomial(jnp.arange(1, N + 1), P),
    "categorical": lambda: dist.Categorical(SIMPLEX),
    "categorical_logits": lambda: dist.Categorical(logits=POS),
    "gamma_poisson": lambda: dist.GammaPoisson(S, S),
    "geometric": lambda: dist.Geometric(P),
    "multinomial": lambda: dist.Multinomial(4, SIMPLEX),
    "dirichlet_multinomial": lambda: dist.DirichletMultinomial(POS, 4),
    "negative_binomial2": lambda: dist.NegativeBinomial2(S, S),
    "ordered_logistic": lambda: dist.OrderedLogistic(M, jnp.array([-1.0, 0, 1])),
    "poisson": lambda: dist.Poisson(S),
    "zero_inflated_poisson": lambda: dist.ZeroInflatedPoisson(P, S),
}


FAST = (
    "binomial",
    "half_normal",
    "left_truncated",
    "log_normal",
    "matrix_normal",
    "mixture_same",
    "multivariate_normal",
    "normal_expanded",
    "shifted_vector",
    "student_t",
    "truncated",
)


@pytest.mark.parametrize("name", some_slow(FAST, sorted(set(BASES) - set(FAST))))
def test_each_row_has_its_own_base(name):
    base = BASES[name]()
    rows = base.batch_shape
    assert rows == (N,)
    # Two that draw by means of tensorflow_probability.
    given = {"truncated_student_t": S, "gaussian_copula_beta": PAIR}
    value = given[name] if name in given else base.sample(jax.random.key(1))
    log_prob, local = split_rows(base, rows)
    assert all(leaf.shape[0] == N for leaf in jax.tree.leaves(local)), "every row has its own"
    np.testing.assert_allclose(jax.vmap(log_prob)(value, local), base.log_prob(value), rtol=1e-4, atol=1e-5)


REFUSED = {
    "masked": lambda: dist.Normal(M, S).mask(M > 0),
    "a matrix of its own": lambda: dist.TransformedDistribution(
        dist.Normal(VEC, 1.0).to_event(1), transforms.LowerCholeskyAffine(VEC[0], TRIL[0])
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_given_to_rows_is_refused(name):
    with pytest.raises(ebm.EnergyError, match="row by row"):
        split_rows(REFUSED[name](), (N,))


@pytest.mark.slow
def test_rows_broadcast_in_two_dimensions():
    base = dist.TruncatedNormal(M[:, None], jnp.array([0.5, 1.0]), low=-1.0)
    value = base.sample(jax.random.key(1))
    d = ebm.EnergyDistribution(lambda v: 0.3 * v**2, base=base, support=base.support)
    np.testing.assert_allclose(d.log_prob(value), base.log_prob(value) - 0.3 * value**2, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda v: d.log_prob(v).sum())(value)
    expected = jax.grad(lambda v: (base.log_prob(v) - 0.3 * v**2).sum())(value)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
