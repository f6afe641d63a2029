"""Two players, each with an optimiser and a pace of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

PARAMS = {"t": jnp.zeros(2), "x$critic": [{"w": jnp.zeros(3)}, {"w": jnp.zeros(())}], "x$other": jnp.zeros(1)}


def values_after(optimizer, num):
    """A parameter of each player after every update, under a gradient of 1 throughout."""

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["t"][0], params["x$critic"][1]["w"], params["x$other"][0])

    run = jax.jit(lambda params: jax.lax.scan(update, (params, optimizer.init(params)), None, length=num)[1])
    return np.asarray(run(PARAMS))


def test_the_rest_waits_for_the_adversary():
    rest, adversary, other = values_after(
        ebm.alternate(optax.sgd(1.0), optax.sgd(0.5), adversary="x$critic", num_adversary_steps=3), 7
    )
    np.testing.assert_allclose(rest, [0, 0, -1, -1, -1, -2, -2])
    np.testing.assert_allclose(other, rest)
    np.testing.assert_allclose(adversary, -0.5 * np.arange(1, 8))


def test_schedules_of_the_rest_count_its_own_updates():
    decay = optax.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.0}))
    rest, *_ = values_after(ebm.alternate(decay, optax.sgd(1.0), adversary="x$critic", num_adversary_steps=2), 8)
    np.testing.assert_allclose(rest, [0, -1, -1, -2, -2, -2, -2, -2])


def test_one_step_each_and_several_names():
    names = ("x$critic", "x$other")
    rest, adversary, other = values_after(
        ebm.alternate(optax.sgd(1.0), optax.sgd(0.5), adversary=names, num_adversary_steps=1), 4
    )
    np.testing.assert_allclose(rest, -np.arange(1.0, 5.0))
    np.testing.assert_allclose(adversary, -0.5 * np.arange(1, 5))
    np.testing.assert_allclose(other, adversary)


def test_under_svi():
    def model():
        numpyro.factor("loss", -(numpyro.param("a", 1.0) + numpyro.param("critic$params", {"w": jnp.ones(2)})["w"].sum()))

    optimizer = ebm.alternate(optax.sgd(1.0), optax.sgd(1.0), adversary="critic", num_adversary_steps=5)
    svi = SVI(model, ebm.empty_guide, optimizer, Trace_ELBO())
    params = svi.run(jax.random.key(0), 11, progress_bar=False).params
    assert params["a"] == 1 - 2
    np.testing.assert_allclose(params["critic$params"]["w"], 1 - 11)


def test_names_that_match_nothing_are_refused_in_init():
    optimizer = ebm.alternate(optax.sgd(1.0), optax.sgd(1.0), adversary=("x$critic", "x$oter"))
    with pytest.raises(ValueError, match=r"'x\$oter'.*Did you mean 'x\$other'\? Known names: t, x\$critic, x\$other"):
        optimizer.init(PARAMS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adversary": "a", "num_adversary_steps": 0}, ValueError, "num_adversary_steps >= 1"),
        ({"adversary": ()}, ValueError, r"needs the names.*adversary='x\$critic'"),
        ({"adversary": ""}, ValueError, "needs the names"),
        ({"adversary": "a", "optimizer": numpyro.optim.Adam(0.1)}, TypeError, "optimisers from optax; got Adam"),
    ],
)
def test_what_is_no_pair_of_players_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        ebm.alternate(**{"optimizer": optax.sgd(1.0), "adversary_optimizer": optax.sgd(1.0), **options})


def test_parameters_without_names_are_refused():
    with pytest.raises(TypeError, match="by the names of their sites"):
        ebm.alternate(optax.sgd(1.0), optax.sgd(1.0), adversary="a").init([jnp.zeros(2)])
