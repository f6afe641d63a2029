"""`FitResult`: what `fit` returns, with short ways to draw from it, to look at it and to keep it."""

import importlib
import inspect
import os
import pickle
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro import handlers
from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.pytrees import check_pickles
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.handlers.results import values_of
from numpyro_ebm.handlers.sites import bare_model
from numpyro_ebm.training.recording import RecordedChains, RecordedHealth

Stop = Literal["end", "patience", "nonfinite", "interrupted", "unhealthy", "data", "callback"]
IN_CURVES = ("step", "loss", "held_out_loss")
FORMAT = 2
"""Number of the format of saved results; `FitResult.load` refuses others."""


class Rollback(NamedTuple):
    """A return of `fit` to an earlier state, under ``on_unhealthy="rollback"``.

    Attributes:
        step: number of updates that had been made.
        to_step: number of updates after which the state was healthy that the run went back to.
        reason: "nonfinite", or the conditions of `NegativePhaseHealth` that held, as "x: gap, frozen".
        rate: part of each step of the optimiser that is taken from here on.
    """

    step: int
    to_step: int
    reason: str
    rate: float


class FitResult(NamedTuple):
    """Result of `fit`.

    Attributes:
        params: values of the ``numpyro.param`` sites: those of the best check with held-out rows, the last finite ones
            without. With ``ema`` they are moving averages.
        state: the last finite state of SVI, whose parameters are no averages; `fit` continues from it by ``init_state``.
        losses: ``(num_updates,)``, the loss of each update that was made, including non-finite ones and those from which a
            rollback went back.
        held_out_losses: loss of the held-out rows at each check, the first before any update; empty without such rows.
        check_steps: number of updates before each of these checks.
        best_step: number of updates that produced ``params``.
        stopped: why the run stopped: "end" (all updates were made), "patience", "nonfinite", "interrupted" (from the
            keyboard), "data" (the iterator of batches came to its end, raised, or yielded a batch that the model does not
            take), "callback" (it raised, or a function
            ``held_out``), or "unhealthy" (after too many rollbacks, or in the ``result`` of an `UnhealthyChainsError`).
        chains: `RecordedChains`; None without ``record_chains``.
        health: `RecordedHealth` (energy gap, acceptance and more at each check); None unless an estimator runs chains.
        ema_params: the moving averages at the end of the run; None without ``ema``.
        history: figures at each check as arrays: "step", "loss" and "gradient_norm" (means since the last check),
            "steps_per_second", with held-out rows "held_out_loss", and with chains "energy_gap/<site>" and
            "acceptance_rate/<site>".
        rollbacks: each `Rollback`, in order.
        model: the model, usually from `estimate`.
        average: state of the moving average, with which `fit` continues if ``init_state`` is this result; None without.
        num_batches: number of batches taken from ``batches``, after which `fit` continues likewise.
        rate: part of each step of the optimiser that is taken after rollbacks, with which `fit` continues likewise under
            ``on_unhealthy="rollback"``; None without.
    """

    params: dict[str, Any]
    state: SVIState
    losses: Float[np.ndarray, " updates"]
    held_out_losses: Float[np.ndarray, " checks"]
    check_steps: Int[np.ndarray, " checks"]
    best_step: int
    stopped: Stop
    chains: RecordedChains | None = None
    health: RecordedHealth | None = None
    ema_params: dict[str, Any] | None = None
    history: dict[str, Shaped[np.ndarray, " checks"]] = {}  # noqa: RUF012 (never changed)
    rollbacks: tuple[Rollback, ...] = ()
    model: Any = None
    average: Any = None
    num_batches: int = 0
    rate: Any = None

    def sample(self, rng_key: PRNGKey, kernel: Any = None, **options: Any) -> Any:
        """Draw from the trained model, as `numpyro_ebm.sample` does with these parameters.

        Args:
            rng_key: random key.
            kernel: a name or a kernel; None for the default of `numpyro_ebm.sample`.
            **options: its other options, such as ``num_samples`` and ``model_args``. ``params`` are values of latent sites,
                such as ``guide.median(result.params)``, which are added to the parameters.

        Returns:
            `Draws`.

        Raises:
            TypeError: for a model whose arguments are missing, with what to write.

        Example:
            ``result.sample(jax.random.key(1), "nuts", num_samples=1000).samples["x"]``
        """
        given = values_of("FitResult.sample", options.get("params") or {})
        model = handlers.condition(bare_model(self.model), given) if given else bare_model(self.model)
        return _public("sample")(rng_key, model, kernel, **self._with_params("sample", options))

    def log_partition(self, rng_key: PRNGKey, **options: Any) -> Any:
        """Estimate log Z of the trained energy, as `numpyro_ebm.log_partition` does with these parameters.

        Args:
            rng_key: random key.
            **options: its other options, such as ``method``, ``site`` and ``model_args``; ``params`` as in `sample`.

        Returns:
            `LogPartition`.

        Raises:
            TypeError: for a model whose arguments are missing, with what to write.
        """
        return _public("log_partition")(rng_key, self.model, **self._with_params("log_partition", options))

    def _with_params(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return options with the parameters, after a check that the model gets its arguments."""
        try:
            inspect.signature(bare_model(self.model)).bind(
                *options.get("model_args", ()), **options.get("model_kwargs") or {}
            )
        except TypeError as error:
            raise TypeError(
                f"The model cannot be called: {error}. Write result.{method}(rng_key, model_args=(x,)), with rows or "
                "whatever else it takes."
            ) from error
        own, given = values_of(f"FitResult.{method}", self), options.get("params") or {}
        return options | {"params": own | values_of(f"FitResult.{method}", given)}

    def to_arviz(self, **options: Any) -> Any:
        """Return the chains that ``record_chains`` recorded, as `numpyro_ebm.to_arviz` does."""
        return _public("to_arviz")(self, **options)

    def plot(self, **options: Any) -> Any:
        """Plot the training, as ``numpyro_ebm.plots.plot_training`` does, and return its axes."""
        return importlib.import_module("numpyro_ebm.plots").plot_training(self, **options)

    def save(self, path: str | os.PathLike, *, pickler: types.ModuleType = pickle) -> None:
        """Write the result to a file, which `load` reads.

        The file is first written beside ``path`` and then takes its place, so that a failure leaves an older file as it was.

        Args:
            path: the file.
            pickler: ``pickle``, which finds the model by the name of its function, or ``cloudpickle``, which also takes
                lambdas and functions inside functions.

        Raises:
            TypeError: for a model that pickle cannot find by name, with what to write.
            OSError: if the file cannot be written.
        """
        version = _public("__version__")
        content = pickler.dumps({"format": FORMAT, "version": version, "result": self})
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike) -> "FitResult":
        """Read a result that `save` wrote. Loading runs code of the file, as unpickling does: open only files you trust.

        Raises:
            EnergyError: for a file of another kind or format, and if the model cannot be found where it was defined.
            OSError: if the file cannot be read.
        """
        written = Path(path).read_bytes()
        try:
            content = pickle.loads(written)
        except (AttributeError, ImportError) as error:
            raise EnergyError(
                f"{path} was saved in a program that defines the model, which cannot be found here: {error}. Import the "
                "module that defines it, or save with result.save(path, pickler=cloudpickle)."
            ) from error
        except Exception as error:  # whatever the bytes are taken for
            raise EnergyError(f"{path} is no file that FitResult.save wrote: {error}.") from error
        if not isinstance(content, dict) or not isinstance(content.get("result"), FitResult):
            raise EnergyError(f"{path} is no file that FitResult.save wrote; it holds {type(content).__name__}.")
        if content["format"] != FORMAT:
            raise EnergyError(
                f"{path} has format {content['format']}, written by numpyro-ebm {content['version']}; this version reads "
                f"format {FORMAT}."
            )
        return content["result"]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Reduce like any tuple, after a check that pickle finds the model.

        Raises:
            TypeError: for a lambda or a local function, with what to write.
        """
        check_pickles("result of fit", [self.model])
        return FitResult, tuple(self)

    def __repr__(self) -> str:
        """Return a short table."""
        rows = [("updates", f"{len(self.losses)}, stopped: {self.stopped}"), *_curves(self)]
        figures = {name: values for name, values in self.history.items() if name not in IN_CURVES and len(values)}
        rows += [(name, f"{values[-1]:.4g} at the last check") for name, values in figures.items()]
        for back in self.rollbacks:
            rows.append((f"rollback at {back.step}", f"to {back.to_step}, steps times {back.rate:.3g}: {back.reason}"))
        kind = "moving averages, " if self.ema_params is not None else ""
        rows.append(("params", f"{kind}after {self.best_step} updates: {', '.join(map(_described, self.params.items()))}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(["FitResult", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _curves(result: FitResult) -> list[tuple[str, str]]:
    """Return the losses in words."""
    losses, held_out, rows = result.losses, result.held_out_losses, []
    if len(losses):
        width = max(1, len(losses) // 20)
        rows.append(("loss", f"{losses[:width].mean():.5g} at first, {losses[-width:].mean():.5g} at the end"))
    if len(held_out):
        best = f"{np.nanmin(held_out):.5g} at step {result.best_step}"
        rows.append(("held-out loss", f"{best}, {held_out[-1]:.5g} at the end"))
    return rows


def _described(param: tuple[str, Any]) -> str:
    """Return the name of a parameter with its shape, or the count of its numbers for a network."""
    name, value = param
    leaves = jax.tree.leaves(value)
    return f"{name} {np.shape(leaves[0])}" if len(leaves) == 1 else f"{name} ({sum(map(np.size, leaves))} numbers)"


def _public(name: str) -> Any:
    """Return a public function of the package. The folders that define them are above this one, and import it."""
    return getattr(importlib.import_module("numpyro_ebm"), name)
