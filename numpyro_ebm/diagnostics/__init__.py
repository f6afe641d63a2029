"""Diagnosis of draws and trainings, reports, standard errors, and ArviZ data."""

from numpyro_ebm.diagnostics._diagnose import diagnose as diagnose
from numpyro_ebm.diagnostics._findings import Diagnosis as Diagnosis
from numpyro_ebm.diagnostics._findings import Finding as Finding
from numpyro_ebm.diagnostics.arviz.convert import to_arviz as to_arviz
from numpyro_ebm.diagnostics.reports import TrainingReport as TrainingReport
from numpyro_ebm.diagnostics.reports import training_report as training_report
from numpyro_ebm.diagnostics.rhat import FunctionRhat as FunctionRhat
from numpyro_ebm.diagnostics.rhat import nested_rhat as nested_rhat
from numpyro_ebm.diagnostics.rhat import split_rhat as split_rhat
from numpyro_ebm.diagnostics.standard_errors import StandardErrors as StandardErrors
from numpyro_ebm.diagnostics.standard_errors import standard_errors as standard_errors
