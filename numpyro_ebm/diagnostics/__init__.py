"""Diagnosis of draws and trainings."""

from numpyro_ebm.diagnostics._diagnose import diagnose as diagnose
from numpyro_ebm.diagnostics._report import Diagnosis as Diagnosis
from numpyro_ebm.diagnostics._report import Finding as Finding
from numpyro_ebm.diagnostics.rhat import FunctionRhat as FunctionRhat
from numpyro_ebm.diagnostics.rhat import nested_rhat as nested_rhat
from numpyro_ebm.diagnostics.rhat import split_rhat as split_rhat
