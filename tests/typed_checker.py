"""What jaxtyping's import hook checks annotations with: an int counts as a float, as in Python's own typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
