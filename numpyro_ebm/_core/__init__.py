"""Errors, types, the registry, callables as pytrees, compiled programs, what NumPyro is running, derivatives."""
