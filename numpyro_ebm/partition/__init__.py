"""Methods for log Z, and bounds on it from both sides."""

from numpyro_ebm.partition._base import AbstractPartition as AbstractPartition
from numpyro_ebm.partition._base import LogPartition as LogPartition
from numpyro_ebm.partition._run import available_partition_methods as available_partition_methods
from numpyro_ebm.partition._run import log_partition as log_partition
from numpyro_ebm.partition.ais import AnnealedImportanceSampling as AnnealedImportanceSampling
from numpyro_ebm.partition.bounds import LogPartitionBounds as LogPartitionBounds
from numpyro_ebm.partition.bounds import log_partition_bounds as log_partition_bounds
from numpyro_ebm.partition.bridge import BridgeSampling as BridgeSampling
from numpyro_ebm.partition.enumeration import Enumeration as Enumeration
from numpyro_ebm.partition.grid import Grid as Grid
from numpyro_ebm.partition.importance import ImportanceSampling as ImportanceSampling
from numpyro_ebm.partition.nce import NoiseContrast as NoiseContrast
from numpyro_ebm.partition.nested import NestedSampling as NestedSampling
from numpyro_ebm.partition.smc import SequentialMonteCarlo as SequentialMonteCarlo
