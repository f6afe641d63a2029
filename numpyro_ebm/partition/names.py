"""Names of the methods for log Z."""

from numpyro_ebm._core.registry import Registry
from numpyro_ebm.partition._base import AbstractPartition
from numpyro_ebm.partition.ais import AnnealedImportanceSampling
from numpyro_ebm.partition.bridge import BridgeSampling
from numpyro_ebm.partition.enumeration import Enumeration
from numpyro_ebm.partition.grid import Grid
from numpyro_ebm.partition.importance import ImportanceSampling
from numpyro_ebm.partition.nce import NoiseContrast
from numpyro_ebm.partition.nested import NestedSampling
from numpyro_ebm.partition.smc import SequentialMonteCarlo

METHODS: Registry[AbstractPartition] = Registry(
    "method",
    AbstractPartition,
    {
        method.name: method
        for method in (
            AnnealedImportanceSampling,
            SequentialMonteCarlo,
            ImportanceSampling,
            BridgeSampling,
            NestedSampling,
            Grid,
            Enumeration,
            NoiseContrast,
        )
    },
)
