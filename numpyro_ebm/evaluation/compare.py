"""`evaluate`: compare models on held-out rows."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Shaped

from numpyro_ebm import partition
from numpyro_ebm._core.errors import EnergyError, UnreliableLogPartitionWarning, nearest
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.evaluation import _draws
from numpyro_ebm.evaluation._draws import ModelDraws
from numpyro_ebm.evaluation._subjects import rows_under
from numpyro_ebm.evaluation._table import COLUMNS, Evaluation
from numpyro_ebm.evaluation.c2st import classifier_two_sample_test
from numpyro_ebm.evaluation.kernel_two_sample import mmd
from numpyro_ebm.evaluation.ksd import ksd_of
from numpyro_ebm.evaluation.likelihood import ApartBounds, likelihood_of
from numpyro_ebm.evaluation.modes import mode_weights
from numpyro_ebm.evaluation.sm import sm_of
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.partition import AbstractPartition, LogPartition, LogPartitionBounds

OF_DRAWS = ("mmd", "c2st", "modes")
DEFAULT = ("log_likelihood", "sm", "ksd", "mmd")


class Subject(NamedTuple):
    """One model: its rows, its draws where a measure needs them, and the inputs that the measures share."""

    site: Site
    is_normalized: bool
    draws: ModelDraws | None
    log_partition: Any
    modes: Any
    keys: Mapping[str, PRNGKey]


def evaluate(
    rng_key: PRNGKey,
    models: Mapping[str, Any],
    rows: ArrayLike,
    *,
    measures: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    log_partition: str
    | AbstractPartition
    | Mapping[str, str | AbstractPartition | LogPartition | LogPartitionBounds] = "ais",
    draws: Mapping[str, Any] | None = None,
    num_draws: int = 1000,
    kernel: str | AbstractKernel | None = None,
    modes: Callable[[Shaped[Array, "*event"]], Any] | ArrayLike | None = None,
    site: str | None = None,
) -> Evaluation:
    """Compare models on rows that none of them was trained on.

    | measure | what it is | does not exist for |
    |---|---|---|
    | "log_likelihood" | `log_likelihood` | scores; bounds on log Z too far apart |
    | "sm" | `sm_loss` | discrete events |
    | "ksd" | `ksd_test` | discrete events; rows with a context each |
    | "mmd" | `mmd` of draws | chains with fewer than 20 effective draws |
    | "c2st" | `classifier_two_sample_test` of draws (scikit-learn) | chains with fewer than 20 effective draws |
    | "modes" | `mode_weights` of draws | |

    The table has a blank where a measure does not exist. All models are evaluated on the same rows, so their densities have
    to be of the same events in the same units. Draws of an energy come from 4 chains, thinned to their effective number. An
    energy with a ``sampler`` other than plain chains, a score and a normalised distribution are drawn by their own
    ``sample``; rows with a context each get one draw per row.

    Args:
        rng_key: random key. Each measure has its own key, the same for all models, so that a figure depends neither on the
            other measures nor on the other models.
        models: models by name: an `EnergyDistribution`, a `ScoreDistribution`, a normalised NumPyro distribution, or
            ``(model, params)`` with a NumPyro model that observes the rows in ``model(rows)`` (write ``lambda x: model(x,
            num_rows=len(x))`` for one with more arguments) and the values of its parameters and latent sites, or the result
            of its training.
        rows: held-out rows, ``(num_rows, *event_shape)``.
        measures: names, or a dict from names to options; None for "log_likelihood", "sm", "ksd" and "mmd", and "modes" where
            ``modes`` is given.
        log_partition: the ``method`` of `log_partition` for the energies; or a dict from model names to methods or to
            results of `log_partition` or `log_partition_bounds` ("ais" for energies that are not in it).
        draws: draws to use in the place of the models' own, by name: ``(num, *event_shape)`` where they are independent,
            ``(num_chains, num, *event_shape)`` for chains.
        num_draws: number of draws of each model.
        kernel: kernel of the chains; None for "nuts", or "gibbs" on discrete supports.
        modes: ``labels_of`` of `mode_weights`.
        site: name of the energy site, for models with several.

    Returns:
        `Evaluation`.

    Raises:
        EnergyError: (a ValueError) for no models, for unknown measures or names, for the measure "modes" without ``modes``,
            and for errors of the measures, with the model's name.
        TypeError: for something that is not a model.

    Example:
        ::

            models = {"energy": (model, result), "gaussian": dist.MultivariateNormal(mean, covariance)}
            print(evaluate(jax.random.key(0), models, x_test))

    References:
        Theis, van den Oord and Bethge, A note on the evaluation of generative models (2016).
    """
    check_key("evaluate", rng_key)
    rows = as_arrays("evaluate", rows)
    check_outside_jit("evaluate", rng_key, rows)
    check_count("evaluate", "num_draws", num_draws, 2)
    options = _measures(measures, modes)
    _check_names(models, draws, log_partition)
    keys = dict(zip((*COLUMNS, "draws", "log_partition"), jax.random.split(rng_key, len(COLUMNS) + 2), strict=True))
    sites = {}
    for name, model in models.items():
        with _of(name):
            sites[name] = rows_under("evaluate", model, rows, site)
    num_rows = _one_number(sites)
    results, notes, compared = {}, {}, {}
    for name, laid_out in sites.items():
        with _of(name):
            is_normalized = isinstance(models[name], dist.Distribution) and unwrap(models[name]) is None
            own = None
            if draws and name in draws:
                own = _draws.given(draws[name], laid_out)
            elif any(measure in OF_DRAWS for measure in options):
                own = _draws.draw(keys["draws"], laid_out, kernel, num_draws, is_normalized=is_normalized)
            log_z = log_partition.get(name, "ais") if isinstance(log_partition, Mapping) else log_partition
            subject = Subject(laid_out, is_normalized, own, log_z, modes, keys)
            found = {measure: MEASURES[measure](subject, **chosen) for measure, chosen in options.items()}
        results[name] = {measure: result for measure, (result, _) in found.items()}
        notes[name] = tuple(
            text for said in (own.notes if own else (), *(each for _, each in found.values())) for text in said
        )
        compared[name] = None if own is None else own.independent
    return Evaluation(results, notes, compared, num_rows)


def _log_likelihood(subject: Subject) -> tuple[Any, tuple[str, ...]]:
    if not subject.site.distribution.has_energy:
        return None, ()
    log_z, doubts = subject.log_partition, ()
    if subject.is_normalized:
        zeros = np.zeros(subject.site.batch_shape)
        log_z = LogPartition(zeros, zeros, np.asarray(np.inf), None)  # pyright: ignore[reportArgumentType]
    elif not isinstance(log_z, LogPartition | LogPartitionBounds):
        log_z, doubts = _log_partition(subject)
    try:
        result = likelihood_of(subject.site, log_z)
    except ApartBounds as error:
        return None, (error.finding,)
    return result, (*result.remarks(), *doubts)


def _log_partition(subject: Subject) -> tuple[LogPartition, tuple[str, ...]]:
    """Estimate log Z by the chosen method, and return it with its warnings as notes below the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_z = partition.log_partition(
            subject.keys["log_partition"], subject.site.distribution, method=subject.log_partition
        )
    for each in caught:
        if not issubclass(each.category, UnreliableLogPartitionWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    doubts = (str(each.message) for each in caught if issubclass(each.category, UnreliableLogPartitionWarning))
    return log_z, tuple(dict.fromkeys(doubts))


def _sm(subject: Subject) -> tuple[Any, tuple[str, ...]]:
    return (sm_of(subject.site) if subject.site.distribution.is_continuous else None), ()


def _ksd(subject: Subject, **options: Any) -> tuple[Any, tuple[str, ...]]:
    if not subject.site.distribution.is_continuous or subject.site.rows_differ:
        return None, ()
    return ksd_of(subject.keys["ksd"], subject.site, **options), ()


def _mmd(subject: Subject, **options: Any) -> tuple[Any, tuple[str, ...]]:
    both = _both(subject)
    return (None if both is None else mmd(subject.keys["mmd"], *both, **options)), ()


def _c2st(subject: Subject, **options: Any) -> tuple[Any, tuple[str, ...]]:
    both = _both(subject)
    return (None if both is None else classifier_two_sample_test(subject.keys["c2st"], *both, **options)), ()


def _modes(subject: Subject, **options: Any) -> tuple[Any, tuple[str, ...]]:
    return mode_weights(subject.modes, subject.draws.all, _rows(subject), **options), ()  # pyright: ignore


MEASURES = {
    "log_likelihood": _log_likelihood,
    "sm": _sm,
    "ksd": _ksd,
    "mmd": _mmd,
    "c2st": _c2st,
    "modes": _modes,
}


def _one_number(sites: Mapping[str, Site]) -> int:
    """Return the number of rows that take part, which has to be the same for all models."""
    counts = {name: each.num_rows if each.mask is None else int(each.mask.sum()) for name, each in sites.items()}
    if len(set(counts.values())) > 1:
        raise EnergyError(f"The models have different numbers of rows, {counts}. Give all of them the same rows.")
    return next(iter(counts.values()))


def _both(subject: Subject) -> tuple[Any, Any] | None:
    """Return independent draws and rows; None where the chains have too few effective draws."""
    draws: Any = subject.draws
    if draws.are_few:
        return None
    independent = draws.independent
    if subject.site.rows_differ:  # ordered by context, which looks like the order of a chain
        independent = jax.random.permutation(jax.random.fold_in(subject.keys["draws"], 1), independent)
    return independent, _rows(subject)


def _rows(subject: Subject) -> Any:
    site = subject.site
    return site.value if site.mask is None else site.value[np.asarray(site.mask)]


def _measures(measures: Iterable[str] | Mapping[str, Mapping[str, Any]] | None, modes: object) -> dict[str, dict[str, Any]]:
    """Check the measures, and return their options by name."""
    if measures is None:
        measures = DEFAULT if modes is None else (*DEFAULT, "modes")
    chosen = [measures] if isinstance(measures, str) else list(measures)
    for name in chosen:
        if name not in MEASURES:
            raise EnergyError(f"Unknown measure '{name}'. {nearest(str(name), MEASURES)}")
    if not chosen:
        raise EnergyError(f"evaluate needs a measure. Known names: {', '.join(MEASURES)}.")
    if ("modes" in chosen) != (modes is not None):
        missing = (
            "modes=labels_of, a function of one event or the modes' centres" if modes is None else "measures=(..., 'modes')"
        )
        raise EnergyError(f"The measure 'modes' and the argument modes need each other. Write {missing}.")
    return {name: dict(measures[name]) if isinstance(measures, Mapping) else {} for name in chosen}


def _check_names(models: Mapping[str, Any], draws: Mapping[str, Any] | None, log_partition: object) -> None:
    if not isinstance(models, Mapping) or not models:
        raise EnergyError(
            "evaluate needs a dict of models by name. Write evaluate(rng_key, {'energy': distribution}, x_test)."
        )
    if isinstance(log_partition, LogPartition | LogPartitionBounds):
        raise EnergyError(
            f"log_partition is the log Z of a single model. Write log_partition={{'{next(iter(models))}': log_z}}."
        )
    for option, given in (("draws", draws), ("log_partition", log_partition)):
        for name in given if isinstance(given, Mapping) else ():
            if name not in models:
                raise EnergyError(f"{option} has '{name}', which is not a model. {nearest(name, models)}")


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Put the model's name in front of the message of any error inside."""
    try:
        yield
    except EnergyError as error:
        raise EnergyError(f"Model '{name}': {error}") from error
