"""Infrastructure: errors, types, the registry, callables as pytrees, compiled programs, NumPyro's stacks, derivatives."""
